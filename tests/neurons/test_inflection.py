"""Plurals have their singulars; forms of verbs and adjectives are no nouns, whatever a dictionary of lemmas says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.neurons.concepts import NounSource, find_forms
from mmray.neurons.inflection import PLURAL_ONLY, SINGULAR, singular, singulars

PAIRS = {
    "en": "bus-buses glass-glasses lens-lenses gas-gases iris-irises leaf-leaves knife-knives bookshelf-bookshelves "
    "loaf-loaves glove-gloves olive-olives stove-stoves puppy-puppies pony-ponies movie-movies cookie-cookies tie-ties "
    "pie-pies potato-potatoes shoe-shoes toe-toes canoe-canoes photo-photos house-houses horse-horses vase-vases "
    "bench-benches dish-dishes moustache-moustaches box-boxes axe-axes quiz-quizzes child-children man-men "
    "policewoman-policewomen person-people mouse-mice goose-geese foot-feet tooth-teeth ox-oxen ski-skis taxi-taxis "
    "menu-menus cactus-cacti walrus-walruses giraffe-giraffes monkey-monkeys boy-boys sandwich-sandwiches",
    "es": "perro-perros luz-luces pez-peces reloj-relojes avión-aviones camión-camiones ratón-ratones mujer-mujeres "
    "coche-coches jardín-jardines",
    "fr": "chien-chiens cheval-chevaux oiseau-oiseaux jeu-jeux genou-genoux avion-avions travail-travaux",
    "it": "gatto-gatti cane-cani banca-banche parco-parchi mela-mele uomo-uomini",
    "pt": "cão-cães balão-balões animal-animais homem-homens flor-flores gato-gatos",
    "de": "Hund-Hunde Haus-Häuser",
}


@pytest.mark.parametrize("language", PAIRS)
def test_plurals_have_their_singulars(language):
    for pair in PAIRS[language].split():
        one, many = pair.casefold().split("-") if language != "de" else pair.split("-")
        assert one.casefold() in singulars(many, language), many
        assert find_forms(f"… {many} …", frozenset({one.casefold()}), language), many
        assert one.casefold() not in singulars(one, language)
        if language == "en":
            assert singular(many, language) == one


@pytest.mark.parametrize(
    "word", [*sorted(SINGULAR), *sorted(PLURAL_ONLY), "tennis", "this", "specimen", "dress", "bus"]
)
def test_singulars_are_left_as_they_are(word):
    assert singulars(word, "en") == ()
    assert singular(word.title(), "en") == word


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A man skiing down a hill", {"skis", "ski"}),
        ("Someone skateboarding", {"skateboard"}),
        ("He is seated and seating guests", {"seat", "chair"}),
        ("A horse tied to a post", {"tie"}),
        ("A thin, bare tree branch", {"bear"}),
        ("A dog in training, trained well", {"train"}),
        ("They are monitoring and booked", {"monitor", "book"}),
        ("A well groomed garden", {"groom"}),
        ("Leaving and left", {"leaf", "leave"}),
    ],
)
def test_forms_of_verbs_and_adjectives_name_no_object(caption, objects):
    assert find_forms(caption, frozenset(objects), "en") == []
    # A census looks by the same rule, in the data's objects and in a lexicon.
    assert NounSource("objects").find(caption, "en", tuple(objects)) == []
    assert NounSource("lexicon", lexicon={None: frozenset(objects)}).find(caption, None, None) == []


def test_two_leaves_are_a_leaf():
    assert [
        m.concept for m in find_forms("Two leaves, a bus and knives", frozenset({"leaf", "bus", "knife"}), "en")
    ] == [
        "leaf",
        "bus",
        "knife",
    ]


@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    st.sampled_from(["en", "es", "fr", "it", "pt", "xx", None]),
)
def test_any_word_has_singulars_other_than_itself(word, language):
    found = singulars(word, language)
    assert word.casefold() not in found
    assert len(set(found)) == len(found)
    assert singular(word, language) == (found[0] if found else word.casefold())
