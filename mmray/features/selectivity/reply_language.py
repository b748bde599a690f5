"""A classifier of texts by label, trained on the run's captions: it recognises the language of steered captions."""

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
class LabelClassifier:
    """A naive Bayes classifier without priors over the words of each label's captions, with their counts."""

    words: dict[str, Counter[str]]

    @cached_property
    def floor(self) -> float:
        """Smoothing that is added to each word's share: half a word of the label with the most words.

        It is the same for all labels, so that a word unseen in several is equally likely in each, whatever their size.
        """
        return 0.5 / max(counts.total() for counts in self.words.values())

    def label(self, text: str) -> str | None:
        """Return the label whose captions explain the words best; None if no caption has any of the words."""
        known = [word for word in words_of(text) if any(word in counts for counts in self.words.values())]
        if not known:
            return None
        # Sorted, so that ties don't depend on the order of the captions.
        return max(sorted(self.words), key=lambda label: sum(self._log_share(label, word) for word in known))

    def share(self, text: str, label: str) -> float | None:
        """Return the fraction of a text's words that this label's captions explain at least as well as any other's.

        Words that occur in no caption are left out. None if none is left.
        """
        known = [word for word in words_of(text) if any(word in counts for counts in self.words.values())]
        best = [max(self._log_share(other, word) for other in self.words) for word in known]
        own = [self._log_share(label, word) >= top for word, top in zip(known, best, strict=True)]
        return sum(own) / len(own) if own else None

    def _log_share(self, label: str, word: str) -> float:
        counts = self.words[label]
        # Shares, not counts, so that a label with more captions has no advantage.
        return math.log(counts[word] / max(1, counts.total()) + self.floor)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, or the characters for scripts without spaces."""
    return WORD.findall(text.casefold())


def train_classifier(captions: Iterable[tuple[str, str]]) -> LabelClassifier:
    """Return a classifier trained on (label, caption) pairs."""
    words: dict[str, Counter[str]] = {}
    for label, caption in captions:
        words.setdefault(label, Counter()).update(words_of(caption))
    return LabelClassifier(words)
