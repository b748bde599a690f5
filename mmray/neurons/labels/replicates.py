"""Which sample counts under which label, and how often: as it is, with labels shuffled, and with samples drawn again.

Everything that is selected from is a sum over samples by label, so that one pass over the data gives the sums of all
replicates: a product of each batch's numbers with a small matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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


def draw(labelled: Mapping[str, str], permutations: int, bootstraps: int, seed: int) -> Replicates:
    """Return replicates of samples whose labels are given.

    Shuffled labels are a permutation: each label keeps its number of samples. Samples are drawn again within their
    label, so that none vanishes. The same seed and labels give the same draws, in whatever order the samples come.
    """
    samples = tuple(sorted(labelled))
    labels = tuple(sorted(set(labelled.values())))
    own = np.array([labels.index(labelled[name]) for name in samples], np.int16)
    generator = np.random.default_rng(seed)
    once = np.ones(len(samples), np.int16)
    label, times = [own], [once]
    for _ in range(permutations):
        label.append(generator.permutation(own))
        times.append(once)
    for _ in range(bootstraps):
        drawn = np.zeros(len(samples), np.int16)
        for number in range(len(labels)):
            members = np.flatnonzero(own == number)
            np.add.at(drawn, generator.choice(members, len(members)), 1)
        label.append(own)
        times.append(drawn)
    return Replicates(samples, labels, permutations, np.stack(label), np.stack(times))
