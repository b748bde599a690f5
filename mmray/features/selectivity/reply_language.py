"""Which label's captions a text reads like: how steering knows the language of what the model wrote."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mmray.neurons.concepts import UNSPACED

WORD = re.compile(rf"{UNSPACED.pattern}|\w+")


@dataclass(frozen=True)
class Recogniser:
    """Words of each label's captions, with how often they occur: a naive Bayes classifier without priors."""

    words: dict[str, Counter[str]]

    @cached_property
    def floor(self) -> float:
        """What a word's share of every label is raised by: half a word of the label that has most.

        One that several labels lack is as likely in each of them, however few words a label has.
        """
        return 0.5 / max(counts.total() for counts in self.words.values())

    def label(self, text: str) -> str | None:
        """Return the label whose captions explain the words best; None where no word is of any of them."""
        known = [word for word in words_of(text) if any(word in counts for counts in self.words.values())]
        if not known:
            return None
        return max(sorted(self.words), key=lambda label: sum(self._log_share(label, word) for word in known))

    def share(self, text: str, label: str) -> float | None:
        """Return the part of a text's words that this label's captions explain at least as well as any other's.

        Words that no caption has are left out; None where none is left.
        """
        known = [word for word in words_of(text) if any(word in counts for counts in self.words.values())]
        best = [max(self._log_share(other, word) for other in self.words) for word in known]
        own = [self._log_share(label, word) >= top for word, top in zip(known, best, strict=True)]
        return sum(own) / len(own) if own else None

    def _log_share(self, label: str, word: str) -> float:
        counts = self.words[label]
        return math.log(counts[word] / max(1, counts.total()) + self.floor)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; of scripts without blanks the characters."""
    return WORD.findall(text.casefold())


def recogniser(captions: Iterable[tuple[str, str]]) -> Recogniser:
    """Return what recognises the labels of these (label, caption) pairs."""
    words: dict[str, Counter[str]] = {}
    for label, caption in captions:
        words.setdefault(label, Counter()).update(words_of(caption))
    return Recogniser(words)
