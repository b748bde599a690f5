"""Object statistics of the whole data (frequency, co-occurrence), and the objects that POPE asks about."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

STRATEGIES = ("random", "popular", "adversarial")
"""How POPE chooses absent objects (Li et al. 2023)."""
Adversarial = Literal["object", "image"]
"""POPE's adversarial objects co-occur most with the object asked about, or with all objects of the image."""
Positives = Literal["drawn", "first"]
"""Which present objects POPE asks about: random ones, or the first of the image."""
GroundTruth = Literal["instances", "captions", "union"]
"""What counts as being in an image: annotated objects, those that human captions name, or both."""


@dataclass(frozen=True)
class ObjectStatistics:
    """The data's objects, in how many samples each one is, and with which others.

    `references`: image key → all its captions, for data that has them in several rows; empty where not needed.
    """

    vocabulary: tuple[str, ...] = ()
    translations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    together: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def absent(
        self, strategy: str, objects: Collection[str], present: Sequence[str], seed: str, adversarial: Adversarial
    ) -> list[str]:
        """Return as many objects that a sample lacks as `present` ones are asked about; fewer if the data has fewer.

        random: uniform. popular: the most frequent in the data. adversarial: those that co-occur most often with each
        object asked about (`object`, as in POPE's code) or with all of the image's (`image`).
        """
        others = [name for name in self.vocabulary if name not in objects]
        if strategy == "random":
            return random.Random(seed).sample(others, min(len(present), len(others)))
        if strategy == "adversarial" and adversarial == "object":
            return self._companions(others, present, seed)
        shared = Counter[str]()
        if strategy == "adversarial":
            for name in objects:
                shared.update(self.together.get(name, {}))
        # For `popular` nothing is shared, so frequency decides. The name breaks ties, for a reproducible order.
        others.sort(key=lambda name: (-shared[name], -self.counts.get(name, 0), name))
        return others[: len(present)]

    def _companions(self, others: Sequence[str], present: Sequence[str], seed: str) -> list[str]:
        """Return for each present object the absent one that co-occurs most with it; a random one where none does."""
        left, chosen = dict.fromkeys(others), []
        for name in present:
            shared = self.together.get(name, {})
            # The sort is stable: of equals the one that the data has first, as in POPE's code.
            best = next((other for other in sorted(shared, key=lambda other: -shared[other]) if other in left), None)
            if best is None and left:
                best = random.Random(f"{seed} {name}").choice(list(left))
            if best is not None:
                del left[best]
                chosen.append(best)
        return chosen


def gather_statistics(
    objects: Iterable[Iterable[str] | None],
    translations: Mapping[str, Mapping[str, str]] | None = None,
    vocabulary: Iterable[str] = (),
    references: Mapping[str, tuple[str, ...]] | None = None,
) -> ObjectStatistics:
    """Return the statistics of samples with these objects (None: unknown); names in lower case.

    `vocabulary` adds objects that no sample may have.
    """
    counts = Counter[str]()
    together: dict[str, Counter[str]] = {}
    for cell in objects:
        names = tuple(dict.fromkeys(name.casefold() for name in cell or ()))
        counts.update(names)
        for name in names:
            together.setdefault(name, Counter()).update(other for other in names if other != name)
    return ObjectStatistics(
        vocabulary=tuple(sorted(counts.keys() | {name.casefold() for name in vocabulary})),
        translations={name.casefold(): dict(forms) for name, forms in (translations or {}).items()},
        counts=dict(counts),
        together={name: dict(others) for name, others in together.items()},
        references=references or {},
    )


def choose_pope_objects(
    statistics: ObjectStatistics,
    objects: Collection[str],
    count: int,
    seed: str,
    positives: Positives = "drawn",
    adversarial: Adversarial = "object",
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the present objects that POPE asks a sample about, and as many absent ones by each strategy.

    `drawn`: `count` random ones, or all if there are fewer. `first`: the first `count`, as in POPE's released
    questions, which leave out images with fewer.
    """
    if positives == "first":
        present = list(objects)[:count] if len(objects) >= count else []
    else:
        # Sorted, because a set's order changes between processes.
        present = random.Random(f"present {seed}").sample(sorted(objects), min(count, len(objects)))
    absent = {
        strategy: statistics.absent(strategy, objects, present, f"{strategy} {seed}", adversarial)
        for strategy in STRATEGIES
    }
    return present, absent
