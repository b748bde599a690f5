"""Paths of the embedded demo model and its data."""

from pathlib import Path

_PACKAGE: Path = Path(__file__).parent

MODEL: Path = _PACKAGE / "model"
"""Checkpoint folder for `from_pretrained`."""

DATA: Path = _PACKAGE / "data" / "census.parquet"
"""1,536 scenes with clean captions in four languages."""

EVALUATION: Path = _PACKAGE / "data" / "evaluation.parquet"
"""384 further scenes with English captions."""

CONCEPTS: Path = _PACKAGE / "data" / "concepts.json"
"""The concepts: English name, kind, and name in four languages."""

SPRITES: Path = _PACKAGE / "recipe" / "sprites.npz"
"""Drawings, one per concept and domain; concepts in the order of `CONCEPTS`."""

DETECTOR: Path = _PACKAGE / "detector"
"""Folder with a detector's heads for the model's vision tower."""
