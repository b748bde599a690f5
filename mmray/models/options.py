"""Options of a model that need no torch: modules, dtypes, and the length of captions."""

from __future__ import annotations

from typing import Literal

Module = Literal["language", "vision", "projector"]
TEXT_BRANCH = "qformer-text"
"""The projector's branch that reads the question, not the image (InstructBLIP's Q-Former)."""
MODULES = ("language", "vision", "projector", TEXT_BRANCH)
"""All modules with neurons, the decoder first."""
Dtype = Literal["auto", "fp32", "bf16", "fp16"]

LONGEST = 64
"""Default limit on the tokens of a generated caption."""
