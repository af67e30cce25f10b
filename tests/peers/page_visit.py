"""A person at the page: what they see and do, for the tests of it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

if importlib.util.find_spec("playwright"):  # where it is missing the tests are only collected; run, they fail
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect

# Said by the browser of every answer with an error status; the page says it better.
FAILED = re.compile(r"Failed to load resource")
_WATCH = """
  window.violations = [];
  addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


class Visit:
    """A page in a browser's own window. `errors_allowed`: whether the server answers with errors on purpose."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors_allowed = False
        self.complaints: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._outside)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _outside(self, request: Request) -> None:
        if not request.url.startswith(self.url):
            self.complaints.append(f"asked for {request.url}")

    def check(self) -> None:
        """Nothing was complained of, and the security policy was never broken."""
        said = [text for text in self.complaints if not (self.errors_allowed and FAILED.search(text))]
        said += self.page.evaluate("window.violations")
        assert not said, said

    def press(self, name: str) -> None:
        """A button."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def write(self, prompt: str) -> None:
        """The whole prompt."""
        self.page.get_by_label("Prompt", exact=True).fill(prompt)

    def generate(self, prompt: str | None = None) -> dict[str, Any]:
        """A completion to its end; the body of the request."""
        if prompt is not None:
            self.write(prompt)
        return self.complete(lambda: self.press("Generate"))

    def complete(self, begin: Callable[[], None]) -> dict[str, Any]:
        """A completion that is begun in some way, to its end; the body of the request."""
        with self.page.expect_request("**/v1/completions") as asked:
            begin()
        self.wait_for_end()
        body: dict[str, Any] = asked.value.post_data_json
        return body

    def wait_for_end(self) -> None:
        """Until nothing is being generated."""
        expect(self.page.get_by_role("button", name="Generate", exact=True)).to_have_attribute("aria-disabled", "false")

    def say(self, words: str | re.Pattern[str]) -> None:
        """What the page tells when a completion has ended."""
        expect(self.page.locator("#status")).to_have_text(words)

    @property
    def text(self) -> str:
        """Prompt and completion as they stand there."""
        return str(self.page.locator("#text").evaluate("(box) => box.textContent"))

    @property
    def completion(self) -> str:
        """The part that was made."""
        return str(self.page.locator("#text .completion").evaluate("(part) => part.textContent"))

    @property
    def state(self) -> dict[str, Any]:
        """Prompt and settings as the fields show them."""
        names = ["prompt", "temperature", "top_p", "top_k", "max_tokens", "seed"]
        state = {name: self.page.locator(f"#{name}").input_value() for name in names}
        return state | {"random": self.page.locator("#random").is_checked()}

    def focused(self) -> str:
        """Where the keyboard is: an element's id, or its class, or its kind."""
        name = "(({id, classList, localName}) => id || classList[0] || localName)(document.activeElement)"
        return str(self.page.evaluate(name))


@contextmanager
def launched() -> Iterator[Browser]:
    """Debian's Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(
    browser: Browser, url: str, fragment: str = "", *, model: str | None = "geese-6b", **options: Any
) -> Iterator[Visit]:
    """Opens the page and waits until it names its model; at the end nothing may have gone wrong."""
    context = browser.new_context(**({"viewport": {"width": 1180, "height": 900}} | options))
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.add_init_script(_WATCH)
    try:
        visit = Visit(context.new_page(), url)
        visit.page.goto(url + fragment)
        if model:
            expect(visit.page.locator("#model")).to_have_text(model)
        yield visit
        visit.check()
    finally:
        context.close()
