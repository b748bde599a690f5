"""The estimated cost of a census, and what its first rows hold, as values that need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

MANY_UNKNOWN, MOST_WITHOUT_NOUNS = 0.1, 0.5
"""Fractions of the captions in unknown languages, and without a noun, above which a warning is given."""

GPUS = {"T4": 16, "A10G, L4": 24, "A100": 40, "L40S": 48, "H100, large A100": 80, "H200": 141}
"""Memory of common GPUs, in GB."""
USABLE = 0.8
"""Fraction of a GPU's memory left by CUDA itself, by fragmentation, and by sums that take a tenth if there is one."""


@dataclass(frozen=True)
class WorkerMemory:
    """Estimated peak memory of a worker on a GPU, in bytes."""

    weights: int
    batch: int
    """Activations and scores of one batch."""
    sums: int
    """Sums per concept, and statistics of each neuron, of two shards."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.batch + self.sums

    @property
    def gpus(self) -> tuple[str, ...]:
        """The common GPUs that one worker fits on, the smallest first."""
        return tuple(f"{name} ({size} GB)" for name, size in GPUS.items() if self.total <= USABLE * size * 1e9)


@dataclass(frozen=True)
class DataSample:
    """What the first rows of the data hold."""

    rows: int
    unreadable: int
    reason: str
    """Why the first unreadable row can't be read; empty if all can."""
    captions: int
    """Rows with a caption."""
    nouns: int
    without_nouns: int
    """Captions in which no noun was found."""
    frequent: tuple[tuple[str, int], ...]
    """The most frequent nouns, and how often each was found."""
    languages: Mapping[str, int]
    """Captions per language, by English name, the most frequent first."""
    guessed: bool
    """Whether some languages are guessed because the data does not name them."""
    unknown_languages: Mapping[str, int]
    """Captions per language that the tagger does not know; empty if nouns come from a list."""
    source: str
    """Kind of noun source."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the data, one line per problem."""
        lines = []
        # At most one line about rows and one about nouns.
        if self.unreadable == self.rows:
            lines.append(f"none of the first {self.rows} rows can be read: {self.reason}")
        elif self.unreadable:
            lines.append(f"{self.unreadable} of the first {self.rows} rows can't be read: {self.reason}")
        unknown, threshold = sum(self.unknown_languages.values()), MANY_UNKNOWN * self.captions
        if unknown > threshold:
            # A guess from a few words is often wrong, so rare languages are not named.
            frequent = [name for name, count in self.unknown_languages.items() if count > threshold]
            others = ["other languages"] if len(frequent) < len(self.unknown_languages) else []
            names = " and ".join(frequent + others)
            hint = "; if they are English: --language en" if self.guessed else ""
            lines.append(
                f"captions {'seem to be' if self.guessed else 'are'} in {names} ({unknown} of {self.captions}): "
                f"--nouns {self.source} finds no nouns there; give --nouns FILE or --objects-column{hint}"
            )
        elif self.without_nouns > MOST_WITHOUT_NOUNS * self.captions:
            lines.append(f"no noun in {self.without_nouns} of {self.captions} captions by --nouns {self.source}")
        return tuple(lines)


@dataclass(frozen=True)
class PartBytes:
    """Bytes of the parts that shards commit."""

    per_shard: float
    per_concept: float
    """Of a shard."""
    per_repeated: float
    """In addition, per concept that occurs more than once in the shard."""
    per_sample: float


@dataclass(frozen=True)
class Timing:
    """How long a worker took for the first samples, after a batch that warmed it up."""

    samples: int
    seconds: float
    phases: Mapping[str, float]
    """Seconds by phase, longest first."""
    parts: PartBytes
    """Bytes of what it would have committed."""


@dataclass(frozen=True)
class Volume:
    """What the run's files hold."""

    shards: int
    samples: int
    concepts: float
    """Of each shard, added up."""
    repeated: float
    """Those that occur more than once in a shard, added up."""
    tables: float
    """Bytes of the tables."""
    parts: PartBytes

    @property
    def bytes_written(self) -> int:
        """Bytes of all files."""
        parts = self.parts
        of_concepts = self.concepts * parts.per_concept + self.repeated * parts.per_repeated
        return int(self.shards * parts.per_shard + of_concepts + self.samples * parts.per_sample + self.tables)


@dataclass(frozen=True)
class CensusEstimate:
    """Estimated size and duration of a census."""

    samples: int
    shards: int
    positions: float
    """Tokens per sample; those of an image are divided among the captions that share a row."""
    parameters: int
    teraflops: float
    """Arithmetic of the whole census, in 10¹² operations."""
    speed: float
    """10¹² operations per second and worker, measured on this machine."""
    workers: int
    occurrences: float
    """Occurrences of nouns per sample."""
    volume: Volume
    memory: WorkerMemory
    neurons: int
    kept: int
    """Neurons that a shard keeps per concept. If they are not all, some ranks may not be certified."""
    sample: DataSample
    timing: Timing | None = None
    """None: the arithmetic and the speed of this machine give the time."""

    @property
    def bytes_written(self) -> int:
        """Bytes of the run; with a timing, judging by the parts of the samples that it took."""
        volume = replace(self.volume, parts=self.timing.parts) if self.timing else self.volume
        return volume.bytes_written

    @property
    def worker_hours(self) -> float:
        """Hours of one worker, without loading the model."""
        if self.timing:
            return self.samples * self.timing.seconds / self.timing.samples / 3600
        return self.teraflops / self.speed / 3600

    @property
    def hours(self) -> float:
        """Hours with these workers, without loading the model."""
        return self.worker_hours / self.workers
