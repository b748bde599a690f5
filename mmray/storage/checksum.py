"""What a stored object was when it was written: a cut, changed or exchanged one is noticed where it is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mmray.errors import DamagedError


@dataclass(frozen=True)
class Checksum:
    """What a stored object was when it was written."""

    size: int
    sha256: str
    rows: int | None = None
    """Of a table."""

    def __post_init__(self) -> None:
        # Read from a file that anybody may have written.
        if not isinstance(self.size, int) or not isinstance(self.sha256, str):
            raise TypeError(f"not a checksum: {self.size!r}, {self.sha256!r}")

    @classmethod
    def of(cls, data: bytes, rows: int | None = None) -> Checksum:
        """Return the checksum of these bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), rows)

    def check(self, data: bytes) -> None:
        """Raise DamagedError unless these are the bytes that were written."""
        self.check_size(len(data))
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DamagedError("changed since it was written (another SHA-256)")

    def check_size(self, size: int) -> None:
        """Raise DamagedError unless this is the size of what was written."""
        if size != self.size:
            raise DamagedError(f"{size:,} bytes instead of {self.size:,}")
