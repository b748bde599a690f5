"""What every piece of work that actors share amounts to once it has ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What could not be done, and the seconds that it all took."""

    failures: int
    """Samples, or whatever is counted, that failed."""
    quarantined: dict[int, str]
    """Unit of work → why it was set aside."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Tell whether all went well."""
        return not self.failures and not self.quarantined
