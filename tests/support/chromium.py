"""Headless Chromium, and axe-core in it, for the tests of pages. `.ci/run` installs Debian's Chromium where it may."""

import shutil
from collections.abc import Iterator
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


def barriers(page: Any) -> list[str]:
    """Return the serious violations of accessibility rules that axe-core finds on a page.

    The page's context must bypass its policy, which lets no script of a test run.
    """
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in found if one["impact"] in GRAVE]
