"""Sums of concepts that memory has no room for, on the worker's disk until they are needed again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mmray.features.census.spill import room_for


class Overflow:
    """Holds the sums of concepts, (score, square, activation) of every neuron, exactly as they were in memory.

    A thread writes them, so that a GPU does not wait. The file has no name: nothing is left of a worker that is killed.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """The concepts, with the occurrences in their sums."""
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._file: Any = None
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def put(
        self, names: Sequence[str], counts: Sequence[int], sums: Float64[Tensor, "quantity concept neuron"]
    ) -> None:
        """Write the sums of concepts over so many occurrences."""
        self._wait()
        for name, count in zip(names, counts, strict=True):
            # Slots in use and free ones are numbered from zero without a gap.
            self._slots[name] = self._free.pop() if self._free else len(self._slots)
            self.counts[name] = count
        self._writing = self._pool.submit(self._write, [self._slots[name] for name in names], counts, sums)

    def take(self, name: str, neurons: int) -> tuple[int, Float64[Tensor, "quantity neuron"]]:
        """Remove a concept, and return its occurrences and sums."""
        self._wait()
        slot, count = self._slots.pop(name), self.counts.pop(name)
        self._free.append(slot)
        self._file.seek(slot * neurons * 24)
        data = bytearray(self._file.read(neurons * (8 if count == 1 else 24)))
        if count > 1:
            return count, torch.frombuffer(data, dtype=torch.float64).view(3, neurons)
        score, activation = torch.frombuffer(data, dtype=torch.float32).view(2, neurons).double()
        return count, torch.stack([score, score.square(), activation])

    def _write(
        self, slots: Sequence[int], counts: Sequence[int], sums: Float64[Tensor, "quantity concept neuron"]
    ) -> None:
        with room_for("sums of concepts"):
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the shard's analysis)
            for number, (slot, count) in enumerate(zip(slots, counts, strict=True)):
                # A single score and activation are fp32 numbers, and the square follows from the score.
                own = sums[[0, 2], number].float() if count == 1 else sums[:, number]
                self._file.seek(slot * sums.shape[2] * 24)
                self._file.write(own.cpu().numpy().tobytes())
            self._file.flush()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None
