"""A run in its folder: what lies where, how shards are committed, who drives it, and what is left over."""

from mmray.runs.folder import ATTEMPTS, DamagedUnitError, RunFolder
from mmray.runs.receipts import Receipt

__all__ = ["ATTEMPTS", "DamagedUnitError", "Receipt", "RunFolder"]
