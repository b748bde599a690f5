"""Which objects a text names, in any language: the data's names, their translations and synonyms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from mmray.errors import InputError
from mmray.neurons.concepts import Mention, find_forms
from mmray.storage import open_object


class Naming:
    """Finds objects by their names: `dogs` names dog, `perro` in a Spanish text does, and what a synonym file lists."""

    def __init__(
        self,
        vocabulary: Iterable[str],
        translations: Mapping[str, Mapping[str, str]],
        synonyms: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.vocabulary = tuple(dict.fromkeys(name.casefold() for name in vocabulary))
        self.translations = translations
        self.synonyms = synonyms or {}
        self._forms: dict[str | None, tuple[dict[str, str], frozenset[str]]] = {}

    def form(self, name: str, language: str | None) -> str:
        """Return an object's name in a language; as it is where there is no translation."""
        return self.translations.get(name, {}).get(language or "", name) or name

    def canonical(self, word: str, language: str | None) -> str:
        """Return the object that a word of a language is the name of; the word itself where there is none."""
        word = word.casefold()
        if word in self.vocabulary or language is None:
            return word
        return next((name for name in self.vocabulary if self.form(name, language).casefold() == word), word)

    def mentions(self, text: str, language: str | None) -> list[Mention]:
        """Return every mention of an object, in order, its concept the object's own name."""
        if language not in self._forms:
            listed = self._listed(language)
            self._forms[language] = listed, frozenset(listed)
        names, forms = self._forms[language]
        found = find_forms(text, forms, language)
        return [Mention(names[mention.concept], mention.start, mention.stop) for mention in found]

    def named(self, text: str, language: str | None) -> set[str]:
        """Return the objects that a text names."""
        return {mention.concept for mention in self.mentions(text, language)}

    def _listed(self, language: str | None) -> dict[str, str]:
        forms: dict[str, str] = {}
        for name in self.vocabulary:
            for form in (self.form(name, language), *self.synonyms.get(name, ())):
                forms.setdefault(form.casefold(), name)
        # An object's own name is never another's synonym.
        forms |= {self.form(name, language).casefold(): name for name in reversed(self.vocabulary)}
        return forms


def read_synonyms(uri: str) -> dict[str, tuple[str, ...]]:
    """Return object → synonyms from a JSON file: `{"dog": ["puppy", …]}`, or lists whose first word is the object.

    Raises InputError for a missing file or another form.
    """
    store, name = open_object(uri)
    try:
        content = json.loads(store.read(name))
        rows = content.items() if isinstance(content, dict) else ((row[0], row[1:]) for row in content)
        return {str(name).casefold(): tuple(map(str, words)) for name, words in rows if not isinstance(words, str)}
    except FileNotFoundError:
        raise InputError(f"--synonyms {uri}: no such file") from None
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f'--synonyms {uri}: not of the form {{"dog": ["puppy", …]}} ({error})') from error
