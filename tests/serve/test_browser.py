"""A served run in headless Chromium: lists from the server, search, SQL, heat maps on demand, and the playground."""

import pytest

from mmray.serve.app import HOST
from tests.support.chromium import Tab, barriers, needs_chromium
from tests.support.served import TOKEN, Client

pytestmark = needs_chromium
PAGES = (
    "",
    "concepts",
    "neurons",
    "layers",
    "properties",
    "sql",
    "playground",
    "concept/dog",
    "neuron/L7.u10",
    "failures",
)


@pytest.fixture(scope="module")
def tab(browser, ask: Client) -> Tab:
    here = f"{HOST}:{ask.port}"
    # Images that are data are requests, too.
    return Tab(browser, f"http://{here}/?token={TOKEN}", lambda url: here not in url[:40] and url[:5] != "data:")


@pytest.fixture
def page(tab: Tab):
    yield tab.load()
    # A sample of the run has a picture that can't be read.
    assert [line for line in tab.said if "404" not in line] == []


def opened(page, place: str) -> None:
    page.evaluate(f"location.hash = '#/{place}'")
    page.wait_for_load_state("networkidle")


def until(page, condition: str) -> None:
    """Wait for a condition. Playwright's own waiting evaluates it within the page, which the page's policy refuses."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def test_search_asks_the_server(page):
    page.keyboard.press("/")
    page.keyboard.type("dog")
    page.wait_for_selector("#found li:has-text('dog')")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text-is('dog')")
    assert TOKEN not in page.url
    page.keyboard.press("/")
    page.keyboard.type("L7.u10")
    page.wait_for_selector("#found li:has-text('L7.u10')")


def test_lists_are_sorted_and_filtered_by_the_server(page):
    opened(page, "concepts")
    page.wait_for_selector("tbody tr")
    page.get_by_role("button", name="score", exact=True).click()
    page.wait_for_selector("th[aria-sort]:has-text('score')")
    # The header says so at once, and the rows follow when the server has answered.
    scores = "[...document.querySelectorAll('tbody td:nth-child(5)')].map((cell) => Number(cell.textContent))"
    until(page, f"{scores}.length > 1 && {scores}.every((one, place, all) => !place || all[place - 1] >= one)")
    page.get_by_label("name contains").fill("og")
    until(page, "[...document.querySelectorAll('tbody b')].every((name) => name.textContent.includes('og'))")
    opened(page, "neurons")
    page.get_by_label("layer").fill("3")
    page.wait_for_selector("[role=status]:has-text('1,024 found')")
    page.get_by_role("button", name="Show more").click()
    page.wait_for_selector("tbody tr:nth-child(400)")


def test_sql_answers_and_refuses(page):
    opened(page, "sql")
    page.get_by_label("SQL", exact=True).fill("select concept, n from concepts order by n desc limit 3")
    page.get_by_role("button", name="Run").click()
    page.wait_for_selector("text=3 rows")
    page.get_by_role("button", name="most used neurons").click()
    page.wait_for_selector("text=20 rows")


def test_heat_maps_are_made_on_demand(page):
    opened(page, "concept/dog")
    page.wait_for_selector("figure")
    page.get_by_role("button", name="10 highest by score").click()
    until(page, "document.querySelectorAll('figure').length === document.querySelectorAll('figure canvas').length")
    opened(page, "neuron/L7.u10")
    page.get_by_role("button", name="heat maps of this neuron").first.click()
    page.wait_for_selector("figure canvas")


def test_the_playground_compares_captions(page):
    opened(page, "playground")
    page.get_by_label("of a concept").fill("dog")
    page.get_by_label("of a concept").press("Enter")
    page.wait_for_selector(".pick[aria-label*='dog']")
    page.locator(".pick[aria-label*='dog']").first.click()
    page.get_by_label("factor: 0 zeroes them").fill("-4")
    page.get_by_role("button", name="Compare captions").click()
    page.wait_for_selector(".said >> nth=1")
    assert "dog" in page.locator(".said").first.inner_text()
    assert page.locator("table[aria-label^='Tokens'] tbody tr").count() >= 8
    page.get_by_role("button", name="Heat map").click()
    page.wait_for_selector(".bench canvas")


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_window(page, width, theme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=theme)
    for place in PAGES:
        opened(page, place)
        assert page.locator("h1").inner_text()
        assert "undefined" not in page.locator("main").inner_text(), place
        assert "NaN" not in page.locator("main").inner_text(), place
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place


def test_every_page_can_be_read_by_everybody(browser, ask: Client):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", bypass_csp=True)
    shown = context.new_page()
    shown.goto(f"http://{HOST}:{ask.port}/?token={TOKEN}")
    shown.wait_for_selector("h1")
    found = {}
    for place in PAGES:
        opened(shown, place)
        found[place] = barriers(shown)
    context.close()
    assert [*found.values()] == [[]] * len(found), found
