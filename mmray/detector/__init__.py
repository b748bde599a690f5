"""The joint model: one vision embedding for an open-vocabulary detector and for the language model."""

from typing import Literal

Shape = Literal["projector", "mlp"]
"""Of an aligned network: LLaVA's own projector, or the deeper MLP of Giulivi & Boracchi (2024)."""
