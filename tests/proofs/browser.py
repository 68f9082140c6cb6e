"""Chromium for the proof of the page. Fails with what to install, and if a page logs an error or calls another host."""

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests import npm

NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE = ("axe-core", "4.14.1")
AXE_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
WAIT_MS = 60_000
"""For what a loaded machine does slowly."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's. Fails the test, and says what to install, where one is missing."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.fail("Chromium is missing: apt-get install chromium", pytrace=False)
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        pytest.fail("Playwright is missing: .venv/bin/pip install 'playwright>=1.50'", pytrace=False)
    with api.sync_playwright() as playwright:
        # Without a sandbox, which does not work for root. Only our own page is shown.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def axe_source() -> str:
    """axe-core, the accessibility checker, as a script."""
    folder = npm.fetch(*AXE, AXE_SHA512, ("axe.min.js",))
    return (folder / "axe.min.js").read_text(encoding="utf-8")


@dataclass
class Tab:
    """A tab on one server's page, and what it did."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and uncaught errors."""
    hosts: set[str] = field(default_factory=set)
    """Hosts that the page sent requests to."""

    @classmethod
    @contextmanager
    def opened(cls, browser: Any, url: str, **options: Any) -> Iterator["Tab"]:
        """A tab without a history. At the end the test fails if there were complaints, or requests to another host."""
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(WAIT_MS)
        tab = cls(context.new_page(), url)
        tab.page.on("console", lambda said: tab._complain(said.type, said.text))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("request", lambda request: tab.hosts.add(urlsplit(request.url).netloc))
        try:
            yield tab
            assert tab.complaints == []
            assert tab.hosts <= {urlsplit(url).netloc}
        finally:
            context.close()

    def _complain(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def expect_failed_loads(self) -> None:
        """Chromium logs a line for each failed or refused request. Forget these, if the test is about such requests."""
        self.complaints = [text for text in self.complaints if "Failed to load resource" not in text]

    def open(self, view: str = "playground") -> Any:
        """Show a view, once the page knows its model."""
        self.page.goto(f"{self.url}/#{view}")
        self.page.wait_for_selector("#examples button", state="attached")
        return self.page

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.page.locator(selector).text_content())

    def wait_for_text(self, selector: str, *parts: str) -> str:
        """Wait until the element has all `parts` in its text, which is returned."""
        locator = self.page.locator(selector)
        for part in parts:
            locator = locator.and_(self.page.locator(selector, has_text=part))
        locator.wait_for(state="attached")
        return self.text(selector)
