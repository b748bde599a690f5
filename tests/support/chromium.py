"""Headless Chromium, and axe-core in it, for the tests of pages. `.ci/run` installs Debian's Chromium where it may."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
GRAVE = ("serious", "critical")


# Not for the session: while it is open, its event loop runs in this thread, and asyncio's other users are refused.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page that each test finds newly loaded, and what it said: errors, warnings, and requests to elsewhere.

    A tab's first load compiles the page's scripts, which takes three times what later ones do.
    """

    def __init__(self, browser: Any, address: str, elsewhere: Callable[[str], bool]) -> None:
        self.said: list[str] = []
        # Waiting for functions is left out: they are evaluated within the page, which its own policy refuses.
        self.page = browser.new_page()
        self.page.on("console", lambda told: self.said.append(told.text) if told.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda asked: self.said.append(asked.url) if elsewhere(asked.url) else None)
        self.page.goto(address)

    def load(self) -> Any:
        """Return the page as a new tab shows it."""
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.page.emulate_media(color_scheme="light")
        self.page.evaluate("localStorage.clear(); location.hash = ''")
        self.said.clear()
        self.page.reload()
        self.page.wait_for_selector("h1")
        return self.page


def barriers(page: Any, *rules: str) -> list[str]:
    """Return the serious violations of accessibility rules, of these or of all, that axe-core finds on a page.

    The page's context must bypass its policy, which lets no script of a test run.
    """
    from axe_playwright_python.base import AXE_SCRIPT

    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    options = {"resultTypes": ["violations"], "preload": False} | (
        {"runOnly": {"type": "rule", "values": rules}} if rules else {}
    )
    found = page.evaluate("(options) => axe.run(options)", options)["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in found if one["impact"] in GRAVE]
