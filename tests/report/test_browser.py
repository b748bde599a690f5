"""The report in headless Chromium: no error, search, pages, pictures, both themes, keys, two widths."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.report.writing import write_report
from mmray.runs.run import open_run
from tests.support.chromium import Tab, barriers, needs_chromium
from tests.support.dogs import dog_run

BESIDE = """[...document.querySelectorAll('figure')].filter((figure) => [...figure.querySelectorAll('*')].some((part) =>
part.getBoundingClientRect().right > figure.getBoundingClientRect().right + 1)).length"""
"""Figures that something stands out of: it would lie over the next one."""
pytestmark = needs_chromium


@pytest.fixture(scope="module", params=["whole", "pages"])
def place(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    run = open_run(made)
    whole = request.param == "whole"
    return f"file://{write_report(run, folder / 'report.html') if whole else write_report(run, pages=folder / 'pages')}"


@pytest.fixture(scope="module")
def made(shared: Callable[..., Path]) -> Path:
    return shared("dogs", dog_run) / "run"


@pytest.fixture(scope="module")
def tab(browser, place) -> Tab:
    return Tab(browser, place, lambda address: address.startswith("http"))


@pytest.fixture
def page(tab: Tab):
    yield tab.load()
    assert tab.said == []


def test_search_finds_a_concept_and_its_page_opens_with_pictures(page):
    page.keyboard.press("/")
    page.keyboard.type("dog")
    assert page.locator("#found li").first.inner_text().startswith("dog")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text-is('dog')")
    while not page.evaluate("[...document.querySelectorAll('main img')].every((image) => image.complete)"):
        page.wait_for_timeout(50)
    widths = page.eval_on_selector_all("main img", "images => images.map((image) => image.naturalWidth)")
    assert len(widths) >= 4
    assert min(widths) > 0
    texts = page.eval_on_selector_all("main img", "images => images.map((image) => image.alt)")
    assert all("dog" in text for text in texts)
    assert page.locator("main canvas").count() == 2  # the samples with heat maps
    assert page.locator("tbody tr").count() >= 10


def test_heat_maps_change_and_go(page):
    page.evaluate("location.hash = '#/concept/dog'")
    page.wait_for_selector("canvas")

    def colours() -> str:
        return page.evaluate("document.querySelector('main canvas').toDataURL()")

    heat = colours()
    page.get_by_role("button", name="mask").click()
    assert colours() != heat
    page.get_by_role("button", name="image", exact=True).click()
    assert page.locator("main canvas").count() == 0


def test_every_page_opens(page):
    links = page.eval_on_selector_all("nav a", "links => links.map((link) => link.getAttribute('href'))")
    assert len(links) >= 6
    for link in links:
        page.evaluate(f"location.hash = {link!r}")
        page.wait_for_selector(f"nav a[aria-current][href='{link}']")
        assert page.locator("h1").inner_text()
        assert "undefined" not in page.locator("main").inner_text()
        assert "NaN" not in page.locator("main").inner_text()


def test_a_neuron_opens_from_a_concept(page):
    page.evaluate("location.hash = '#/concept/dog'")
    page.wait_for_selector("tbody a.mono")
    name = page.locator("tbody a.mono").first.inner_text()
    page.locator("tbody a.mono").first.click()
    page.wait_for_selector(f"h1:text-is('{name}')")
    # Five highest and five lowest samples, and its map over an image of the concept.
    assert page.locator("figure").count() == 11
    assert page.locator("figcaption mark").count() >= 10
    page.wait_for_selector(".plot .main-svg")


def test_concepts_sort_and_walk_by_keys(page):
    page.evaluate("location.hash = '#/concepts'")
    page.wait_for_selector("tbody tr")
    counts = page.eval_on_selector_all("tbody tr td:nth-child(4)", "cells => cells.map((cell) => +cell.textContent)")
    assert counts == sorted(counts, reverse=True)
    page.get_by_role("button", name="concept", exact=True).click()
    names = page.eval_on_selector_all("tbody tr td:nth-child(2)", "cells => cells.map((cell) => cell.textContent)")
    assert names == sorted(names)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("tr.at td").nth(1).inner_text() == names[1]
    page.evaluate("location.hash = '#/concept/dog'")
    page.wait_for_selector("h1:text-is('dog')")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:not(:text-is('dog'))")
    page.keyboard.press("Escape")
    page.wait_for_selector("h1:text-is('Concepts')")


def test_languages_and_domains_are_told_as_texts(page):
    page.get_by_role("link", name="Languages and domains").click()
    page.wait_for_selector(".plot .main-svg")
    assert page.locator("h2").all_text_contents()[0] == "Domains by DAPE, all modules together, all tokens"
    assert page.locator("h2").count() == 3
    # Two measures by language, and one by domain of a module and of all. Each has three controls of two masks and two
    # labels; the frame is the mask's own label.
    assert page.locator("table.matrix").count() == 12
    assert page.locator("table.matrix td").count() == 48
    assert page.locator("table.matrix td.own").count() == 24
    effects = page.locator("section.card", has_text="Answers to held-out questions: mean score").first
    row = effects.locator("tbody tr").first.inner_text().split()
    # Label, what is zeroed, n, value without a mask, then per module the value with it, its change and the interval.
    assert row[:5] == ["en", "its", "neurons", "12", "0.500"]
    assert row[5:] == ["0.250", "−0.250", "(−0.500", "to", "−0.125)"] * 2
    assert effects.locator("p").all_inner_texts()[1:] == ["en: scored for 0.", "<b>%{x}</b>: scored for 1."]
    replies = page.locator("section.card", has_text="Replies that change").first
    assert "<b>What?</b>" in replies.inner_text()
    first = page.locator("table.matrix td").nth(12)
    assert first.inner_text().split() == ["+2.000", "1.900", "to", "2.100"]
    assert "English: 1.000 → 3.000, +2.000 (95 %: 1.900 to 2.100), 5 samples" in first.get_attribute("title")
    assert page.locator("h2 + p, .turns li, .matrix th").filter(has_text="<b>").count() > 0
    assert page.locator("main b:text-is('%{x}'), main i, main script").count() == 0
    assert all(page.eval_on_selector_all(".plot", "plots => plots.map((plot) => plot.getAttribute('aria-label'))"))
    assert page.locator(".xtitle").all_text_contents()[:1] == ["layer"]


def background(page) -> tuple[int, ...]:
    said = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in said.removeprefix("rgb(").removesuffix(")").split(","))


def test_both_themes(page):
    assert min(background(page)) > 200
    page.emulate_media(color_scheme="dark")
    assert max(background(page)) < 60
    page.locator("#theme").click()
    assert min(background(page)) > 200
    page.emulate_media(color_scheme="light")
    page.locator("#theme").click()
    assert max(background(page)) < 60


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    hashes = page.eval_on_selector_all("nav a", "links => links.map((link) => link.getAttribute('href'))")
    assert {"#/", "#/selectivity", "#/saliency", "#/hallucination"} <= set(hashes)
    for hash in (*hashes, "#/concept/dog", "#/failures"):
        page.evaluate(f"location.hash = '{hash}'")
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, hash
        assert page.evaluate(BESIDE) == 0, hash


SHOWN = """[document.querySelector('nav'), document.querySelector('main')].map((part) => {
  const copy = part.cloneNode(true);
  copy.querySelectorAll('.plot').forEach((plot) => plot.replaceChildren());
  copy.querySelectorAll('[src]').forEach((picture) => picture.removeAttribute('src'));
  return copy.outerHTML;
})"""
"""What a page shows, but for the insides of charts, whose parts Plotly gives names by chance, and for where a picture
comes from: the one file holds it, and of several files one is it."""


def test_one_file_and_several_show_the_same(browser, made, tmp_path):
    """So that what is found out about one is true of the other."""
    run = open_run(made)
    places = write_report(run, tmp_path / "report.html"), write_report(run, pages=tmp_path / "pages")
    forms = [browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce") for _ in places]
    for shown, place in zip(forms, places, strict=True):
        shown.goto(f"file://{place}")
        shown.wait_for_selector("h1")
    for hash in pages_of(forms[0]):
        for shown in forms:
            shown.evaluate(f"location.hash = '{hash}'")
        for _ in range(50):  # until the files of the second have been read
            forms[0].wait_for_timeout(100)
            one, other = (shown.evaluate(SHOWN) for shown in forms)
            if one == other:
                break
        assert one == other, hash
    for shown in forms:
        shown.close()


def pages_of(shown) -> list[str]:
    """Return what opens each page that the menu has, and those of a concept, of two, of a neuron and of failures."""
    hashes = shown.eval_on_selector_all("nav a", "links => links.map((link) => link.getAttribute('href'))")
    return [*hashes, "#/concept/dog", "#/compare/dog/cat", "#/neuron/L7.u10", "#/failures"]


@pytest.mark.parametrize("place", ["whole"], indirect=True)
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_can_be_read_by_everybody(browser, place, width):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="light", reduced_motion="reduce", bypass_csp=True
    )
    shown = context.new_page()
    shown.goto(place)
    shown.wait_for_selector("h1")
    found = {}
    for hash in pages_of(shown):
        shown.evaluate(f"location.hash = {hash!r}")
        shown.wait_for_timeout(100)
        found[hash] = barriers(shown)
        # The other theme is other colours, and nothing else.
        shown.emulate_media(color_scheme="dark")
        assert max(background(shown)) < 60
        found[f"{hash} in dark"] = barriers(shown, "color-contrast", "link-in-text-block")
        shown.emulate_media(color_scheme="light")
    context.close()
    assert [*found.values()] == [[]] * len(found), found


def test_the_overview_works_one_example_through(page):
    card = page.locator(".example")
    assert card.locator("canvas").count() == 1
    assert card.locator(".legend").count() == 1
    assert card.locator("tbody tr").count() == 4
    card.locator("a", has_text="dog").first.click()
    page.wait_for_selector("h1:text-is('dog')")


def test_a_picture_opens_larger_with_its_map_and_without(page):
    page.evaluate("location.hash = '#/concept/dog'")
    page.locator("button.zoom", has=page.locator("canvas")).first.click()
    shown = page.locator("dialog")
    assert shown.locator("img").count() == 2
    assert shown.locator("canvas").count() == 1
    assert "dog" in shown.locator("p").inner_text()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert page.locator("h1").inner_text() == "dog"


def test_a_table_is_saved_as_csv_and_json(page):
    page.evaluate("location.hash = '#/concepts'")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save Concepts as CSV").click()
    rows = list(csv.DictReader(Path(saved.value.path()).read_text(encoding="utf-8").splitlines()))
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save Concepts as JSON").click()
    known = json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))
    assert {row["concept"]: float(row["score"]) for row in rows} == {row["name"]: row["score"] for row in known}
    assert len(rows) == page.locator("tbody tr").count()


def test_concepts_are_filtered_by_how_often_they_occur(page):
    page.evaluate("location.hash = '#/concepts'")
    counts = "cells => cells.map((cell) => +cell.textContent)"
    before = page.eval_on_selector_all("tbody tr td:nth-child(4)", counts)
    least = max(before)
    page.get_by_label("occurrences, at least").fill(str(least))
    after = page.eval_on_selector_all("tbody tr td:nth-child(4)", counts)
    assert after == [count for count in before if count >= least]
    assert len(after) < len(before)


def test_two_captions_differ_by_words_not_by_what_stands_next_to_them(page):
    compared = "differing('A dog, a cat.', 'A bus, a cat too.')"
    before, after = page.evaluate(f"{compared}.map((side) => side.map((part) => part.outerHTML || part).join(''))")
    assert before == "A <del>dog</del>, a cat."
    assert after == "A <ins>bus</ins>, a cat<ins> </ins><ins>too</ins>."


def test_two_concepts_are_compared(page):
    page.evaluate("location.hash = '#/concept/dog'")
    other = page.evaluate("INDEX.concepts.find((row) => row.name !== 'dog').name")
    page.get_by_label("compare with").fill(other)
    page.get_by_label("compare with").press("Enter")
    page.wait_for_selector(f"h1:text-is('dog and {other}')")
    page.wait_for_selector("main tbody tr")
    pages = page.evaluate("(names) => Promise.all(names.map((name) => SOURCE.part(`c:${name}`)))", ["dog", other])
    listed = [{row["neuron"] for row in one["neurons"]} for one in pages]
    assert page.locator("main tbody tr").count() == len(listed[0] | listed[1])
    assert page.locator("main tbody td", has_text="both").count() == len(listed[0] & listed[1])


def test_columns_say_what_they_mean(page):
    page.evaluate("location.hash = '#/concept/dog'")
    page.wait_for_selector("th[title]")
    title = page.locator("th", has_text=re.compile("^score")).get_attribute("title")
    assert "mean over the concept's occurrences" in title


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_moves_while_a_page_loads(browser, place, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, bypass_csp=True)
    context.add_init_script(
        "window.moved = 0; new PerformanceObserver((list) => list.getEntries().forEach((one) => {"
        " window.moved += one.value; })).observe({type: 'layout-shift', buffered: true});"
    )
    shown = context.new_page()
    shown.goto(place)
    moved = {}
    for hash in ("#/", "#/concepts", "#/concept/dog", "#/neuron/L7.u10", "#/properties", "#/edits"):
        shown.evaluate(f"history.replaceState(null, '', '{hash}')")
        shown.reload()
        shown.wait_for_selector("h1")
        shown.wait_for_timeout(300)
        moved[hash] = shown.evaluate("window.moved")
    context.close()
    # Google's bound of a good page.
    assert max(moved.values()) <= 0.1, moved
