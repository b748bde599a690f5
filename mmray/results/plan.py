"""What a census would cost, as a value to print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
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

    @property
    def hours(self) -> float:
        """Hours with these workers, model loading left out."""
        return self.teraflops / self.speed / self.workers / 3600
