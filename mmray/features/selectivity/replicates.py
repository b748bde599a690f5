"""Replicates of labelled samples: the data as it is, with labels shuffled, and with samples drawn again.

The selection only sees sums over samples per label. So one pass over the data gives the sums of all replicates: the
product of each batch's values with a small matrix.
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
    """Label and weight of each sample in each replicate.

    Replicate 0 is the data as it is. Then come `permutations` with shuffled labels, then the bootstrap draws.
    """

    samples: tuple[str, ...]
    labels: tuple[str, ...]
    permutations: int
    label: Int[ndarray, "replicate sample"]
    """Index of the sample's label."""
    times: Int[ndarray, "replicate sample"]
    """How often the sample counts."""

    @cached_property
    def columns(self) -> dict[str, int]:
        """Sample → its column."""
        return {name: column for column, name in enumerate(self.samples)}

    def __len__(self) -> int:
        return len(self.label)

    def matrix(self, samples: Sequence[str]) -> Float[Tensor, "replicate_label sample"]:
        """Return how often each of these samples counts under each label of each replicate, in that order of rows."""
        columns = [self.columns[name] for name in samples]
        label, times = self.label[:, columns], self.times[:, columns]
        # [replicate, label, sample]; a bootstrap draw may count a sample several times or not at all.
        counts = (label[:, None] == np.arange(len(self.labels))[None, :, None]) * times[:, None]
        return torch.from_numpy(counts.reshape(-1, len(samples)).astype(np.float32))


def draw(
    labelled: Mapping[str, str],
    permutations: int,
    bootstraps: int,
    seed: int,
    images: Mapping[str, str] | None = None,
) -> Replicates:
    """Draw replicates of samples, given their labels and the image that each belongs to.

    Samples of one image are similar whatever their labels, so images are drawn. A shuffle exchanges the labels of two
    images with as many samples, then shuffles them within each image. So a label of the image (its domain) stays with
    images, and a label of the sample (its language) moves within. Each label keeps its number of samples.

    The bootstrap draws images among those with the same labels, so that no label vanishes. The same seed and labels
    give the same draws, whatever the order of the samples.
    """
    samples = tuple(sorted(labelled))
    labels = tuple(sorted(set(labelled.values())))
    own = np.array([labels.index(labelled[name]) for name in samples], np.int16)
    members: dict[str, list[int]] = defaultdict(list)
    for column, name in enumerate(samples):
        members[name if images is None else images.get(name, name)].append(column)
    by_size = _grouped(members.values(), len)
    by_labels = _grouped(members.values(), lambda columns: tuple(sorted({int(own[column]) for column in columns})))
    # Everything above is sorted, so the draws depend on the seed and the labels alone.
    generator = np.random.default_rng(seed)
    once = np.ones(len(samples), np.int16)
    label = [own, *(_shuffled(own, by_size, generator) for _ in range(permutations)), *[own] * bootstraps]
    times = [once] * (1 + permutations) + [_drawn(len(samples), by_labels, generator) for _ in range(bootstraps)]
    return Replicates(samples, labels, permutations, np.stack(label), np.stack(times))


def _grouped(images: Iterable[list[int]], key: Callable[[list[int]], Any]) -> list[list[list[int]]]:
    """Group images, given the columns of their samples, by a key; groups are in order of their keys."""
    found: dict[Any, list[list[int]]] = defaultdict(list)
    for columns in images:
        found[key(columns)].append(columns)
    return [group for _, group in sorted(found.items())]


def _shuffled(
    own: Int[ndarray, " sample"], by_size: Sequence[Sequence[list[int]]], generator: np.random.Generator
) -> Int[ndarray, " sample"]:
    label = own.copy()
    for group in by_size:
        columns = np.array(group)
        # First images exchange their rows of labels, then each row is shuffled within its image.
        label[columns] = generator.permuted(own[columns[generator.permutation(len(group))]], axis=1)
    return label


def _drawn(
    samples: int, by_labels: Sequence[Sequence[list[int]]], generator: np.random.Generator
) -> Int[ndarray, " sample"]:
    times = np.zeros(samples, np.int16)
    for group in by_labels:
        drawn = np.bincount(generator.choice(len(group), len(group)), minlength=len(group))
        times[np.concatenate(group)] = np.repeat(drawn, [len(columns) for columns in group])
    return times
