"""What a census would cost, as a value to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
    """Captions by language, in English, the most frequent first."""
    guessed: bool
    """Whether some of the languages are a guess, for the data does not name them."""
    unknown_languages: Mapping[str, int]
    """Captions in languages that the tagger does not know; none where nouns come from a list."""
    source: str
    """Where nouns come from."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the data, a line each."""
        lines = []
        if self.unreadable == self.rows:
            lines.append(f"none of the first {self.rows} rows can be read: {self.reason}")
        elif self.unreadable:
            lines.append(f"{self.unreadable} of the first {self.rows} rows can't be read: {self.reason}")
        unknown = sum(self.unknown_languages.values())
        if unknown > MANY * self.captions:
            # A guess of a few words is often wrong: what is rare is not named.
            often = [name for name, count in self.unknown_languages.items() if count > MANY * self.captions]
            others = ["other languages"] if len(often) < len(self.unknown_languages) else []
            names = " and ".join(often + others)
            doubt = "; if they are English: --language en" if self.guessed else ""
            lines.append(
                f"captions {'seem to be' if self.guessed else 'are'} in {names} ({unknown} of {self.captions}): "
                f"--nouns {self.source} finds no nouns there; give --nouns FILE or --objects-column{doubt}"
            )
        elif self.without_nouns > MOST * self.captions:
            lines.append(f"no noun in {self.without_nouns} of {self.captions} captions by --nouns {self.source}")
        return tuple(lines)


MANY, MOST = 0.1, 0.5
"""Parts of the captions above which those in unknown languages, and those without a noun, are worth a warning."""


@dataclass(frozen=True)
class CensusEstimate:
    """Estimates made without running anything: from the configuration, some captions, and one product of matrices."""

    samples: int
    shards: int
    positions: float
    """Tokens a sample, image included."""
    parameters: int
    teraflops: float
    """Arithmetic of the whole census, in 10¹² operations."""
    speed: float
    """10¹² operations a second of one worker, as just measured on this machine."""
    workers: int
    occurrences: float
    """Occurrences a sample."""
    bytes_written: int
    neurons: int
    kept: int
    """Neurons that a shard keeps per concept; where they are not all, ranks may lack a certificate."""
    sample: DataSample

    @property
    def hours(self) -> float:
        """Hours with these workers, model loading left out."""
        return self.teraflops / self.speed / self.workers / 3600
