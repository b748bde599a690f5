"""Which sample counts under which label, and how often: as it is, with labels shuffled, and with samples drawn again.

Everything that is selected from is a sum over samples by label, so that one pass over the data gives the sums of all
replicates: a product of each batch's numbers with a small matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor


@dataclass(frozen=True)
class Replicates:
    """Replicate 0 is the data as it is; then come `permutations` with shuffled labels, then the bootstrap draws."""

    samples: tuple[str, ...]
    labels: tuple[str, ...]
    permutations: int
    label: Int[ndarray, "replicate sample"]
    times: Int[ndarray, "replicate sample"]

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each sample stands."""
        return {name: place for place, name in enumerate(self.samples)}

    def __len__(self) -> int:
        return len(self.label)

    def matrix(self, samples: Sequence[str]) -> Float[Tensor, "replicate_label sample"]:
        """Return how often each of these samples counts under each label in each replicate; replicate by replicate."""
        columns = [self.places[name] for name in samples]
        label, times = self.label[:, columns], self.times[:, columns]
        counts = (label[:, None] == np.arange(len(self.labels))[None, :, None]) * times[:, None]
        return torch.from_numpy(counts.reshape(-1, len(samples)).astype(np.float32))


def draw(
    labelled: Mapping[str, str],
    permutations: int,
    bootstraps: int,
    seed: int,
    images: Mapping[str, str] | None = None,
) -> Replicates:
    """Return replicates of samples whose labels are given; `images` tells of samples which share one.

    Samples of one image are alike whatever their labels, so what is drawn is images. Shuffled, an image exchanges its
    labels with another of as many samples, and then its samples theirs among themselves: a label of the image stays one
    of an image, and one of the sample (its language) moves within. Each label keeps its number of samples. Images are
    drawn again among those with the same labels, so that none vanishes. The same seed and labels give the same draws,
    in whatever order the samples come.
    """
    samples = tuple(sorted(labelled))
    labels = tuple(sorted(set(labelled.values())))
    own = np.array([labels.index(labelled[name]) for name in samples], np.int16)
    members: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(samples):
        members[name if images is None else images.get(name, name)].append(place)
    by_size = _alike(members.values(), len)
    by_labels = _alike(members.values(), lambda places: tuple(sorted({int(own[place]) for place in places})))
    generator = np.random.default_rng(seed)
    once = np.ones(len(samples), np.int16)
    label = [own, *(_shuffled(own, by_size, generator) for _ in range(permutations)), *[own] * bootstraps]
    times = [once] * (1 + permutations) + [_drawn(len(samples), by_labels, generator) for _ in range(bootstraps)]
    return Replicates(samples, labels, permutations, np.stack(label), np.stack(times))


def _alike(members: Iterable[list[int]], what: Callable[[list[int]], Any]) -> list[list[list[int]]]:
    """Return images that are alike in what is asked, lists of where their samples stand, together."""
    found: dict[Any, list[list[int]]] = defaultdict(list)
    for places in members:
        found[what(places)].append(places)
    return [some for _, some in sorted(found.items())]


def _shuffled(
    own: Int[ndarray, " sample"], by_size: Sequence[Sequence[list[int]]], generator: np.random.Generator
) -> Int[ndarray, " sample"]:
    label = own.copy()
    for some in by_size:
        places = np.array(some)
        label[places] = generator.permuted(own[places[generator.permutation(len(some))]], axis=1)
    return label


def _drawn(
    samples: int, by_labels: Sequence[Sequence[list[int]]], generator: np.random.Generator
) -> Int[ndarray, " sample"]:
    times = np.zeros(samples, np.int16)
    for some in by_labels:
        drawn = np.bincount(generator.choice(len(some), len(some)), minlength=len(some))
        times[np.concatenate(some)] = np.repeat(drawn, [len(places) for places in some])
    return times
