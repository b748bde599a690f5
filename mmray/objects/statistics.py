"""What the questions of an evaluation need to know of the whole data: its objects, how frequent, and which together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

STRATEGIES = ("random", "popular", "adversarial")
"""How POPE chooses absent objects (Li et al. 2023)."""
Adversarial = Literal["object", "image"]
"""What POPE's adversarial objects are most often together with: the object asked for, or all of the image's."""
Positives = Literal["drawn", "first"]
"""Which present objects POPE asks for."""
GroundTruth = Literal["instances", "captions", "union"]
"""What counts as being in an image: annotated objects, those that people's captions name, or both."""


@dataclass(frozen=True)
class ObjectStatistics:
    """Names of the data's objects, in how many samples each is, and in how many with which other.

    `references`: key of an image → all its captions, of data that has them in several rows, where they were asked for.
    """

    vocabulary: tuple[str, ...] = ()
    translations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    together: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def absent(
        self, strategy: str, objects: Collection[str], present: Sequence[str], seed: str, adversarial: Adversarial
    ) -> list[str]:
        """Return an object that a sample with these lacks for each of those that it is asked for, if there are so many.

        random: drawn evenly; popular: the data's most frequent; adversarial: what is most often together with the
        object asked for (`object`, as POPE's code does), or with all of the image's (`image`).
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
        others.sort(key=lambda name: (-shared[name], -self.counts.get(name, 0), name))
        return others[: len(present)]

    def _companions(self, others: Sequence[str], present: Sequence[str], seed: str) -> list[str]:
        """Return for each present object the absent one most often with it; one drawn where none ever is.

        Of equals the one that the data has first, as POPE's code has it.
        """
        left, chosen = dict.fromkeys(others), []
        for name in present:
            shared = self.together.get(name, {})
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
    """Return the facts of data whose samples have these objects (None: not known); names in lower case.

    `vocabulary` are objects of the data that perhaps no sample has.
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


def asked_objects(
    facts: ObjectStatistics,
    objects: Collection[str],
    count: int,
    seed: str,
    positives: Positives = "drawn",
    adversarial: Adversarial = "object",
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the present objects that POPE asks a sample for, and as many absent ones by each strategy.

    Present ones are drawn, as many as there are; or the `first` ones, as released, of images that have enough.
    """
    if positives == "first":
        present = list(objects)[:count] if len(objects) >= count else []
    else:
        present = random.Random(f"present {seed}").sample(sorted(objects), min(count, len(objects)))
    return present, {
        strategy: facts.absent(strategy, objects, present, f"{strategy} {seed}", adversarial) for strategy in STRATEGIES
    }
