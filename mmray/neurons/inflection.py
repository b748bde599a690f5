"""Plural nouns to singulars, so that `dogs` is found as `dog`, but `seated` is not found as `seat`.

A lemma dictionary can't do this: it also knows verbs and adjectives, and gives `ski` for "skiing", `tie` for "tied" and
`bear` for "bare". These rules only undo plurals. Where the spelling is ambiguous they return several singulars (`axes`:
axe, axis), which the caller looks up in a list of nouns.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Parse `plural:singular/singular …`."""
    return {plural: tuple(singulars.split("/")) for plural, singulars in (pair.split(":") for pair in text.split())}


IRREGULAR = _table(
    "axes:axe/axis bases:base/basis beaux:beau brethren:brother bureaux:bureau cacti:cactus calves:calf "
    "chateaux:chateau crises:crisis criteria:criterion dice:die/dice dwarves:dwarf elves:elf feet:foot fungi:fungus "
    "gateaux:gateau geese:goose halves:half hippopotami:hippopotamus hooves:hoof indices:index knives:knife "
    "leaves:leaf lice:louse lives:life loaves:loaf matrices:matrix mice:mouse oases:oasis octopi:octopus oxen:ox "
    "people:person phenomena:phenomenon plateaux:plateau quizzes:quiz scarves:scarf selves:self sheaves:sheaf "
    "shelves:shelf tableaux:tableau teeth:tooth thieves:thief vertices:vertex wharves:wharf wives:wife wolves:wolf"
)
"""English plurals that no rule covers."""

ENDINGS = _table(
    "children:child women:woman men:man knives:knife shelves:shelf wives:wife loaves:loaf leaves:leaf teeth:tooth "
    "mice:mouse people:person"
)
"""The same at the end of compounds: grandchildren, policewomen, bookshelves."""

SINGULAR = _words(
    "alias asparagus atlas axis basis bias bus canvas chaos chassis christmas clematis cosmos crisis debris diabetes "
    "gas ibis iris lens mantis mars metropolis molasses news oasis pancreas pelvis portcullis rhinoceros series "
    "species tennis texas thermos trellis venus"
)
"""English nouns in -s that are singular, or equal to their plural."""

PLURAL_ONLY = _words(
    "binoculars clothes goggles headphones jeans leggings overalls pajamas pants pliers pyjamas scissors shears "
    "shorts sunglasses tights tongs trousers tweezers"
)
"""English plurals without a singular."""

NO_PLURALS = _words(
    "abdomen acumen always amen as cyclamen does goes has his hers is its lumen omen ours perhaps plus pumice ramen "
    "regimen semen specimen stamen theirs this thus towards us versus was whereas yes yours"
)
"""English words that look like plurals but are not, such as those in -men."""

KEEPS_E = _words(
    "ache aloe auntie avalanche axe backhoe beanie birdie bowtie brioche brownie budgie cache calorie canoe cliche "
    "collie cookie creche doe doggie excuse floe foe foodie freebie fuse genie goalie groupie headache hippie hoe "
    "hoodie horseshoe kiddie lassie lingerie magpie menagerie mistletoe moustache movie muse mustache necktie newbie "
    "niche oboe onesie pixie porsche potpie prairie quiche roe rookie rotisserie ruse scottie selfie shoe sloe "
    "smoothie snowshoe sweetie talkie tiptoe toe use veggie woe yorkie zombie"
)
"""English singulars whose final -e can't be told from the plural."""

VOWEL_US = _words("bayous caribous emus flus gnus gurus haikus kudus menus sudokus tiramisus tofus tutus zebus yous")
"""English plurals of nouns in -u; other words in -us are singular."""

SIBILANT = ("ses", "xes", "zes", "ches", "shes")

ROMANCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "es": _table("ones:ón anes:án enes:én/en ines:ín eses:és ces:z/ce es:/e s:"),
    "pt": _table("ões:ão ães:ão ais:al éis:el óis:ol is:il ns:m res:r zes:z s:"),
    "fr": _table("eaux:eau aux:al/au/ail eux:eu oux:ou s:"),
    "it": _table("chi:co ghi:go che:ca ghe:ga i:o/e/io/a e:a"),
}
"""Language → plural ending → possible singular endings."""

IRREGULAR_ROMANCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fr": _table("yeux:œil/oeil messieurs:monsieur mesdames:madame cieux:ciel"),
    "it": _table("uomini:uomo uova:uovo dita:dito buoi:bue"),
}


@cache
def lemma(word: str, language: str | None) -> str:
    """Return the dictionary form of a word; the word itself in a language that simplemma does not know."""
    # Imported here: loading its dictionaries takes a second, which reading a run does not need.
    import simplemma
    from simplemma.strategies.dictionaries import dictionary_factory

    code = (language or "en")[:2].lower()
    if code not in dictionary_factory.SUPPORTED_LANGUAGES:
        return word
    return str(simplemma.lemmatize(word, lang=code))


def singulars(word: str, language: str | None) -> tuple[str, ...]:
    """Return the singular nouns that a word may be the plural of, in lower case, most likely first; often none.

    English, Spanish, French, Italian and Portuguese have rules; other languages take simplemma's dictionary form, and
    none if simplemma does not know them.
    """
    return _singulars(word, (language or "en")[:2].lower())


def singular(word: str, language: str | None) -> str:
    """Return the most likely singular of a noun, in lower case; the word itself if it is no plural."""
    return next(iter(singulars(word, language)), word.casefold())


@cache
def _singulars(word: str, code: str) -> tuple[str, ...]:
    if code == "en":
        return _english(word.casefold())
    if code in ROMANCE:
        return _romance(word.casefold(), code)
    # Verbs are no problem here: in these languages their infinitives have endings of their own.
    found = lemma(word, code).casefold()
    return (found,) if found != word.casefold() else ()


def _english(word: str) -> tuple[str, ...]:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in SINGULAR | PLURAL_ONLY | NO_PLURALS:
        return ()
    for plural, singulars in ENDINGS.items():
        if word.endswith(plural):
            return tuple(word.removesuffix(plural) + one for one in singulars)
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "'s", "’s")):
        return ()
    stem = word[:-1]
    if word.endswith("us"):
        return (stem,) if word in VOWEL_US else ()
    if word.endswith(("sis", "itis", "polis")):
        return ()
    if word.endswith("ies"):
        # Four-letter words keep their e: ties, pies.
        found = (stem,) if len(word) == 4 else (f"{word[:-3]}y", stem)
        return found[::-1] if stem in KEEPS_E else found
    if stem in KEEPS_E:
        return (stem,)
    if word.endswith("oes"):
        return word[:-2], stem
    if word.endswith(SIBILANT):
        # After a sibilant the plural adds -es (buses, dishes), unless the singular ends in -e (horses, caches).
        bare = word[:-2]
        sibilant = bare in SINGULAR or bare.endswith(("ss", "us", "x", "ch", "sh", "tz", "zz"))
        ends_in_e = bare.endswith(("ous", "aus"))  # houses, causes
        return (bare, stem) if sibilant and not ends_in_e else (stem, bare)
    return (stem,)


def _romance(word: str, code: str) -> tuple[str, ...]:
    if irregular := IRREGULAR_ROMANCE.get(code, {}).get(word):
        return irregular
    found = [
        word.removesuffix(ending) + one
        for ending, ones in ROMANCE[code].items()
        if word.endswith(ending) and len(word) > len(ending)
        for one in ones
    ]
    # A plural may move or drop an accent (camiones: camión), which only the dictionary knows.
    known = lemma(word, code).casefold() if found else word
    plain = {_without_accents(one) for one in found}
    accented = [known] if known != word and known not in found and _without_accents(known) in plain else []
    return tuple(dict.fromkeys([*accented, *found]))


def _without_accents(word: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))


def article(word: str) -> str:
    """Return "a" or "an" by the word's first letter; spelling alone gives "an unicorn"."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def with_article(word: str) -> str:
    """Return the word after its indefinite article."""
    return f"{article(word)} {word}"
