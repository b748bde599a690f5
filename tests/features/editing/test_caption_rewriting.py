"""Captions with a noun exchanged or left out; hypothesis writes the captions."""

from hypothesis import given
from hypothesis import strategies as st

from mmray.features.editing.caption_rewriting import replaced, rest_kept
from mmray.neurons.concepts import Mention, find_forms
from mmray.neurons.inflection import with_article

THINGS = ("dog", "apple", "unicorn", "ball", "owl", "hot dog", "egg")
CONJUNCTIONS = {"en": " and ", "es": " y ", "fr": " et ", "zh": " 和 "}


def caption(things: list[str], language: str = "en") -> str:
    names = [with_article(thing) for thing in things] if language == "en" else things
    conjunction = CONJUNCTIONS[language]
    listed = ", ".join(names[:-1]) + conjunction + names[-1] if len(names) > 1 else names[0]
    return f"An image of {listed} on a red background."


def mention(text: str, thing: str, language: str = "en") -> Mention:
    (found,) = [found for found in find_forms(text, frozenset(THINGS), language) if found.concept == thing]
    return found


lists = st.lists(st.sampled_from(THINGS), min_size=1, max_size=4, unique=True)


@given(lists, st.data())
def test_another_word_stands_where_the_first_did(things: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(things) - 1))
    other = data.draw(st.sampled_from([thing for thing in THINGS if thing not in things]))
    text = caption(things)
    wanted = caption([*things[:place], other, *things[place + 1 :]])
    assert replaced(text, [(mention(text, things[place]), other)], "en") == wanted
    assert rest_kept(text, wanted, mention(text, things[place]), "en")


@given(lists, st.sampled_from(sorted(CONJUNCTIONS)), st.data())
def test_a_thing_may_leave_its_list(things: list[str], language: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(things) - 1))
    left = [*things[:place], *things[place + 1 :]]
    text = caption(things, language)
    if left:
        assert rest_kept(text, caption(left, language), mention(text, things[place], language), language)


@given(lists, st.data())
def test_what_changes_elsewhere_is_seen(things: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(things) - 1))
    text = caption(things)
    found = mention(text, things[place])
    assert not rest_kept(text, caption(things).replace("red", "blue"), found, "en")
    assert not rest_kept(text, "A" + text[2:], found, "en")
    assert not rest_kept(text, "", found, "en")
    others = [number for number in range(len(things)) if number != place]
    if others:
        changed = data.draw(st.sampled_from(others))
        other = data.draw(st.sampled_from([thing for thing in THINGS if thing not in things]))
        wrong = caption([other if number == changed else thing for number, thing in enumerate(things)])
        assert not rest_kept(text, wrong, found, "en")


def test_all_mentions_are_exchanged() -> None:
    text = "Dogs and a dog beside an old dog, no Dog."
    words = [(mention, "owl") for mention in find_forms(text, frozenset({"dog"}), "en")]
    assert len(words) == 4
    assert replaced(text, words, "en") == "Owls and an owl beside an old owl, no owl."
    # An article of another language is left alone, as are words that are no plural.
    assert replaced("a perro", [(Mention("perro", 2, 7), "oso")], "es") == "a oso"
    assert replaced("a bus", [(Mention("bus", 2, 5), "egg")], "en") == "an egg"
