"""What the questions of an evaluation need to know of the whole data: its objects, how frequent, and which together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

STRATEGIES = ("random", "popular", "adversarial")
"""How POPE chooses absent objects (Li et al. 2023)."""


@dataclass(frozen=True)
class DataFacts:
    """Names of the data's objects, in how many samples each is, and in how many with which other."""

    vocabulary: tuple[str, ...] = ()
    translations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    together: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def absent(self, strategy: str, objects: frozenset[str], count: int, seed: str) -> list[str]:
        """Return objects that a sample with these lacks.

        random: drawn evenly; popular: the data's most frequent; adversarial: those most often together with its own.
        """
        others = [name for name in self.vocabulary if name not in objects]
        if strategy == "random":
            return random.Random(seed).sample(others, min(count, len(others)))
        shared = Counter[str]()
        if strategy == "adversarial":
            for name in objects:
                shared.update(self.together.get(name, {}))
        others.sort(key=lambda name: (-shared[name], -self.counts.get(name, 0), name))
        return others[:count]


def gather_facts(
    objects: Iterable[Iterable[str] | None], translations: Mapping[str, Mapping[str, str]] | None = None
) -> DataFacts:
    """Return the facts of data whose samples have these objects (None: not known); names in lower case."""
    counts = Counter[str]()
    together: dict[str, Counter[str]] = {}
    for cell in objects:
        names = frozenset(name.casefold() for name in cell or ())
        counts.update(names)
        for name in names:
            together.setdefault(name, Counter()).update(names - {name})
    return DataFacts(
        vocabulary=tuple(sorted(counts)),
        translations={name.casefold(): dict(forms) for name, forms in (translations or {}).items()},
        counts=dict(counts),
        together={name: dict(others) for name, others in together.items()},
    )
