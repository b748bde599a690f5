"""A run on disk: its folder, receipts, lease, snapshots of tables, status, verification and sweep."""

from mmray.runs.folder import ATTEMPTS, DamagedUnitError, RunFolder
from mmray.runs.receipts import Receipt

__all__ = ["ATTEMPTS", "DamagedUnitError", "Receipt", "RunFolder"]
