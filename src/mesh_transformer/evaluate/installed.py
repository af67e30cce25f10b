"""lm-evaluation-harness is an optional package: one place that says so, and what it must be kept from doing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from mesh_transformer.config.errors import UserError


def require_harness() -> None:
    """Returns if lm-evaluation-harness is installed.

    Raises:
        UserError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks are run by lm-evaluation-harness, which is not installed\n"
            "install it: pip install 'mesh-transformer[eval]'; the perplexity of a text (--text FILE) needs none of it"
        )
    _import_without_bars()


def _import_without_bars() -> None:
    """The harness shows a bar for every step that it takes, which cannot be turned off but when tqdm is imported."""
    if "tqdm" in sys.modules:
        return
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        importlib.import_module("tqdm")
    finally:
        if before is None:
            del os.environ[name]


def command() -> None:
    """The harness' own command line, with the arguments of this process."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Within it the harness starts no processes, and leaves the random generators as they were.

    It would fork for the bootstrap of standard errors, which a process with JAX's threads may not survive.
    """
    name, generators = "DISABLE_MULTIPROC", (random.getstate(), np.random.get_state())
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        random.setstate(generators[0])
        np.random.set_state(generators[1])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within it the harness and the libraries below it report nothing less than an error."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "httpx", "filelock")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lm_eval|datasets|huggingface_hub)(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
