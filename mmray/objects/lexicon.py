"""Which objects a text names, in any language: the data's names, their translations and synonyms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mmray.data.samples import Sample
from mmray.neurons.concepts import Mention, find_forms
from mmray.objects.words import ObjectWords


class ObjectLexicon:
    """Finds objects in texts: `dogs` names dog, and so do its synonyms and, in a Spanish text, `perro`.

    Its objects are those of `vocabulary` and of `words`.
    """

    def __init__(
        self,
        vocabulary: Iterable[str],
        translations: Mapping[str, Mapping[str, str]],
        words: ObjectWords | None = None,
    ) -> None:
        self.words = words or ObjectWords()
        names = (*vocabulary, *self.words.synonyms)
        self.vocabulary = tuple(dict.fromkeys(name.casefold() for name in names))
        self.translations = translations
        self._forms: dict[str | None, tuple[dict[str, str], frozenset[str]]] = {}

    def form(self, name: str, language: str | None) -> str:
        """Return an object's name in a language; the name itself without a translation."""
        return self.translations.get(name, {}).get(language or "", name) or name

    def canonical(self, word: str, language: str | None) -> str:
        """Return the object that a word names in a language; the word itself if none."""
        word = word.casefold()
        if word in self.vocabulary or language is None:
            return word
        return next((name for name in self.vocabulary if self.form(name, language).casefold() == word), word)

    def mentions(self, text: str, language: str | None) -> list[Mention]:
        """Return every mention of an object in order; its concept is the object's own name."""
        # Built once per language: a census-sized evaluation reads thousands of captions.
        if language not in self._forms:
            names = self._names_by_form(language)
            # Phrases are searched for too: the longer match wins, so "hot dog" is not found as a dog.
            self._forms[language] = names, frozenset((*names, *self.words.phrases))
        names, forms = self._forms[language]
        found = [(self.words.phrases.get(m.concept, m.concept), m) for m in find_forms(text, forms, language)]
        words = {word for word, _ in found}
        # As in CHAIR: in a text with a toilet, the seat is the toilet's and no chair.
        hidden = {other for word, others in self.words.hidden.items() if word in words for other in others}
        return [
            Mention(names[word], mention.start, mention.stop)
            for word, mention in found
            if word in names and word not in hidden
        ]

    def named(self, text: str, language: str | None) -> set[str]:
        """Return the objects that a text names, without repetition."""
        return {mention.concept for mention in self.mentions(text, language)}

    def _names_by_form(self, language: str | None) -> dict[str, str]:
        forms: dict[str, str] = {}
        for name in self.vocabulary:
            for form in (self.form(name, language), *self.words.synonyms.get(name, ())):
                forms.setdefault(form.casefold(), name)
        # An object's own name overrides another's synonym. Reversed: of objects with one name the first counts.
        forms |= {self.form(name, language).casefold(): name for name in reversed(self.vocabulary)}
        return forms


def objects_of(sample: Sample) -> frozenset[str] | None:
    """Return a sample's objects in lower case; None: unknown."""
    return None if sample.objects is None else frozenset(name.casefold() for name in sample.objects)
