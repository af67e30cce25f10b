"""A browser, the page's server with known answers, and a visit to it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from page_server import PageServer, serving
from page_visit import Visit, launched, visiting

if importlib.util.find_spec("playwright"):  # where it is missing the tests are only collected; run, they fail
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serving() as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: PageServer) -> Iterator[Visit]:
    with visiting(browser, server.url) as visit:
        yield visit
