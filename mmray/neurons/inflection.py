"""Plural nouns → their singulars, so that `dogs` is found as `dog` and `seated` is never found as `seat`.

A dictionary of lemmas can't do this: it knows the forms of verbs and adjectives too, and gives `ski` for "skiing",
`tie` for "tied" and `bear` for "bare". The rules here undo a plural and nothing else. They propose several singulars
where the spelling leaves it open (`axes`: ax, axe), for the caller to look up in a list of nouns.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache

IRREGULAR = {
    "axes": ("axe", "axis"),
    "bases": ("base", "basis"),
    "beaux": ("beau",),
    "brethren": ("brother",),
    "bureaux": ("bureau",),
    "cacti": ("cactus",),
    "calves": ("calf",),
    "chateaux": ("chateau",),
    "crises": ("crisis",),
    "criteria": ("criterion",),
    "dice": ("die", "dice"),
    "dwarves": ("dwarf",),
    "elves": ("elf",),
    "feet": ("foot",),
    "fungi": ("fungus",),
    "gateaux": ("gateau",),
    "geese": ("goose",),
    "halves": ("half",),
    "hippopotami": ("hippopotamus",),
    "hooves": ("hoof",),
    "indices": ("index",),
    "knives": ("knife",),
    "leaves": ("leaf",),
    "lice": ("louse",),
    "lives": ("life",),
    "loaves": ("loaf",),
    "matrices": ("matrix",),
    "mice": ("mouse",),
    "oases": ("oasis",),
    "octopi": ("octopus",),
    "oxen": ("ox",),
    "people": ("person",),
    "phenomena": ("phenomenon",),
    "plateaux": ("plateau",),
    "quizzes": ("quiz",),
    "scarves": ("scarf",),
    "selves": ("self",),
    "sheaves": ("sheaf",),
    "shelves": ("shelf",),
    "tableaux": ("tableau",),
    "teeth": ("tooth",),
    "thieves": ("thief",),
    "vertices": ("vertex",),
    "wharves": ("wharf",),
    "wives": ("wife",),
    "wolves": ("wolf",),
}
"""English plurals that no rule undoes."""

ENDINGS = {
    "children": "child",
    "women": "woman",
    "men": "man",
    "knives": "knife",
    "shelves": "shelf",
    "wives": "wife",
    "loaves": "loaf",
    "leaves": "leaf",
    "teeth": "tooth",
    "mice": "mouse",
    "people": "person",
}
"""The same at the end of a compound: grandchildren, policewomen, bookshelves."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR = _words(
    "alias asparagus atlas axis basis bias bus canvas chaos chassis christmas clematis cosmos crisis debris diabetes "
    "gas ibis iris lens mantis mars metropolis molasses news oasis pancreas pelvis portcullis rhinoceros series "
    "species tennis texas thermos trellis venus"
)
"""English nouns that end with an s and are no plural, or are their own."""

PLURAL_ONLY = _words(
    "binoculars clothes goggles headphones jeans leggings overalls pajamas pants pliers pyjamas scissors shears "
    "shorts sunglasses tights tongs trousers tweezers"
)
"""English plurals without a singular."""

NO_PLURALS = _words(
    "abdomen acumen always amen as cyclamen does goes has his hers is its lumen omen ours perhaps plus pumice ramen "
    "regimen semen specimen stamen theirs this thus towards us versus was whereas yes yours"
)
"""English words that look like plurals, such as those in -men, and are none."""

KEEPS_E = _words(
    "ache aloe auntie avalanche axe backhoe beanie birdie bowtie brioche brownie budgie cache calorie canoe cliche "
    "collie cookie creche doe doggie excuse floe foe foodie freebie fuse genie goalie groupie headache hippie hoe "
    "hoodie horseshoe kiddie lassie lingerie magpie menagerie mistletoe moustache movie muse mustache necktie newbie "
    "niche oboe onesie pixie porsche potpie prairie quiche roe rookie rotisserie ruse scottie selfie shoe sloe "
    "smoothie snowshoe sweetie talkie tiptoe toe use veggie woe yorkie zombie"
)
"""English singulars in -e of which the plural alone doesn't tell that they have it."""

VOWEL_US = _words("bayous caribous emus flus gnus gurus haikus kudus menus sudokus tiramisus tofus tutus zebus yous")
"""English plurals in -us, of nouns in -u; other words in -us are singular."""

SIBILANT = ("ses", "xes", "zes", "ches", "shes")

ROMANCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "es": {
        "ones": ("ón",),
        "anes": ("án",),
        "enes": ("én", "en"),
        "ines": ("ín",),
        "eses": ("és",),
        "ces": ("z", "ce"),
        "es": ("", "e"),
        "s": ("",),
    },
    "pt": {
        "ões": ("ão",),
        "ães": ("ão",),
        "ais": ("al",),
        "éis": ("el",),
        "óis": ("ol",),
        "is": ("il",),
        "ns": ("m",),
        "res": ("r",),
        "zes": ("z",),
        "s": ("",),
    },
    "fr": {"eaux": ("eau",), "aux": ("al", "au", "ail"), "eux": ("eu",), "oux": ("ou",), "s": ("",)},
    "it": {
        "chi": ("co",),
        "ghi": ("go",),
        "che": ("ca",),
        "ghe": ("ga",),
        "i": ("o", "e", "io", "a"),
        "e": ("a",),
    },
}
"""Language → endings of plurals, and what each may stand for in the singular."""

IRREGULAR_ROMANCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fr": {"yeux": ("œil", "oeil"), "messieurs": ("monsieur",), "mesdames": ("madame",), "cieux": ("ciel",)},
    "it": {"uomini": ("uomo",), "uova": ("uovo",), "dita": ("dito",), "buoi": ("bue",)},
}


@cache
def lemma(word: str, language: str | None) -> str:
    """Return the dictionary form of a word; the word itself in a language that simplemma does not know."""
    # Imported here: its dictionaries take a second that reading a run need not spend.
    import simplemma
    from simplemma.strategies.dictionaries import dictionary_factory

    code = (language or "en")[:2].lower()
    if code not in dictionary_factory.SUPPORTED_LANGUAGES:
        return word
    return str(simplemma.lemmatize(word, lang=code))


def singulars(word: str, language: str | None) -> tuple[str, ...]:
    """Return the singular nouns that a word may be the plural of, in lower case and the likeliest first; often none.

    Languages other than English, Spanish, French, Italian and Portuguese take simplemma's dictionary form, which is a
    noun's where the caller looks for nouns: their infinitives have endings of their own. A language that simplemma does
    not know has no plurals.
    """
    code = (language or "en")[:2].lower()
    return _singulars(word, code)


def singular(word: str, language: str | None) -> str:
    """Return the likeliest singular of a noun, in lower case; the word itself where it is no plural."""
    return next(iter(singulars(word, language)), word.casefold())


@cache
def _singulars(word: str, code: str) -> tuple[str, ...]:
    if code == "en":
        return _english(word.casefold())
    if code in ROMANCE:
        return _romance(word.casefold(), code)
    found = lemma(word, code).casefold()
    return (found,) if found != word.casefold() else ()


def _english(word: str) -> tuple[str, ...]:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in SINGULAR | PLURAL_ONLY | NO_PLURALS:
        return ()
    for plural, one in ENDINGS.items():
        if word.endswith(plural):
            return (word.removesuffix(plural) + one,)
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "'s", "’s")):
        return ()
    stem = word[:-1]
    if word.endswith("us"):
        return (stem,) if word in VOWEL_US else ()
    if word.endswith(("sis", "itis", "polis")):
        return ()
    if word.endswith("ies"):
        # Words of four letters keep their e: ties, pies.
        found = (stem,) if len(word) == 4 else (f"{word[:-3]}y", stem)
        return found[::-1] if stem in KEEPS_E else found
    if stem in KEEPS_E:
        return (stem,)
    if word.endswith("oes"):
        return word[:-2], stem
    if word.endswith(SIBILANT):
        # What is left without -es is the noun where it needs the e to be spoken: buses, dishes; else horses, caches.
        bare = word[:-2]
        needs = bare in SINGULAR or bare.endswith(("ss", "us", "x", "ch", "sh", "tz", "zz"))
        spelt = bare.endswith(("ous", "aus"))
        return (bare, stem) if needs and not spelt else (stem, bare)
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
    # A plural may move or drop an accent (camiones: camión), which the dictionary knows.
    known = lemma(word, code).casefold() if found else word
    plain = {_plain(one) for one in found}
    accented = [known] if known != word and known not in found and _plain(known) in plain else []
    return tuple(dict.fromkeys([*accented, *found]))


def _plain(word: str) -> str:
    """Return a word without its accents."""
    return "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))


def article(word: str) -> str:
    """Return "a" or "an" as the word's first letter wants it: by spelling alone, so "an unicorn"."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def with_article(word: str) -> str:
    """Return the word behind its indefinite article."""
    return f"{article(word)} {word}"
