"""What a model can be asked for, known without torch: number formats, modules, and how long a caption may be."""

from __future__ import annotations

from typing import Literal

Module = Literal["language", "vision", "projector"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]

LONGEST = 64
"""Tokens at most in a generated caption, where nothing else is asked for."""
