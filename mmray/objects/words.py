"""Synonyms of objects, and phrases in which such a word names something else.

`coco_objects.json` has COCO's 80 objects, with the rules that CHAIR (Rohrbach et al. 2018) hard-codes for them: a baby
elephant is no person, a toilet seat no chair, a train track no train.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mmray.errors import InputError
from mmray.storage import open_object

COCO, NONE = "coco", "none"
"""Settings for the shipped table, and for no table; anything else is a file."""
TABLE = Path(__file__).with_name("coco_objects.json")


@dataclass(frozen=True)
class ObjectWords:
    """Synonyms by object, and when such a word names something else.

    Every listed object counts, whether the data has it or not. `phrases`: phrase → the word that it counts as; None: it
    names no object. `hidden`: word → words that don't count in a text that has it.
    """

    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    phrases: Mapping[str, str | None] = field(default_factory=dict)
    hidden: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a digest of everything that decides which objects a text names."""
        parts = [self.synonyms, self.phrases, self.hidden]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def table_for(synonyms: str | None, vocabulary: Collection[str]) -> str:
    """Return the given setting; by default COCO's table for data with COCO's objects only, else none."""
    if synonyms is not None:
        return synonyms
    return COCO if vocabulary and coco_words().synonyms.keys() >= set(vocabulary) else NONE


def open_words(synonyms: str | None, vocabulary: Iterable[str]) -> ObjectWords:
    """Return the words of `coco`, `none` or a file for data with these objects; None: the default of `table_for`.

    Raises InputError for a file that can't be read.
    """
    objects = frozenset(vocabulary)
    table = table_for(synonyms, objects)
    if table == NONE:
        return ObjectWords()
    if table == COCO:
        return coco_words()
    listed = read_synonyms(table)
    # CHAIR's rules hold for COCO's objects, whatever their synonyms; they would be wrong for other objects.
    known = coco_words().synonyms.keys() >= objects | listed.keys()
    return replace(coco_words(), synonyms=listed) if known else ObjectWords(listed)


@cache
def coco_words() -> ObjectWords:
    """Return the shipped words for COCO's 80 objects."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    phrases: dict[str, str | None] = dict(content["phrases"])
    # CHAIR's "baby elephant" counts as an elephant, and not as a baby, which is a person.
    phrases |= {f"{qualifier} {word}": word for qualifier, words in content["qualified"].items() for word in words}
    synonyms, hidden = ({name: tuple(words) for name, words in content[key].items()} for key in ("synonyms", "hidden"))
    return ObjectWords(synonyms, phrases, hidden)


def read_synonyms(uri: str) -> dict[str, tuple[str, ...]]:
    """Return object → synonyms from a file, in lower case.

    JSON: `{"dog": ["puppy", …]}`, or lists whose first word is the object. Else text as CHAIR's `synonyms.txt`: a line
    per object, its name and synonyms separated by commas. Raises InputError for a missing file or another form.
    """
    store, name = open_object(uri)
    try:
        text = store.read(name).decode()
        rows: Iterable[tuple[Any, Any]]
        if name.lower().endswith(".json") or text.lstrip().startswith(("{", "[")):
            content = json.loads(text)
            rows = content.items() if isinstance(content, dict) else ((row[0], row[1:]) for row in content)
        else:
            lines = ([word.strip() for word in line.split(",") if word.strip()] for line in text.splitlines())
            rows = ((words[0], words[1:]) for words in lines if words)
        found: dict[str, tuple[str, ...]] = {}
        for key, words in rows:
            # A single string would be split into letters.
            if not isinstance(words, str):
                own = str(key).casefold()
                found[own] = tuple(dict.fromkeys((*found.get(own, ()), *(str(word).casefold() for word in words))))
    except FileNotFoundError:
        raise InputError(f"--synonyms {uri}: no such file; give coco, none, or a file of synonyms") from None
    # JSON of any other form fails in one of these ways; bytes that are not UTF-8 raise a ValueError too.
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        form = '{"dog": ["puppy", …]}, nor a line such as "dog, puppy" per object'
        raise InputError(f"--synonyms {uri}: not of the form {form} ({error})") from error
    return found
