"""A run in its folder: what lies where, how shards are committed, who drives it, and what is left over."""

from mmray.runs.folder import ATTEMPTS, Receipt, RunFolder

__all__ = ["ATTEMPTS", "Receipt", "RunFolder"]
