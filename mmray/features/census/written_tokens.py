"""The tokens that a neuron writes at an activation, looked up in the table of `decoding`; needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray


def written_tokens(
    decoded: pa.Table, neurons: Sequence[int] | ndarray, activations: Sequence[float] | ndarray
) -> pa.Array:
    """Return the ten tokens that each neuron writes at this activation: below zero, those that its row suppresses.

    `decoded` has one row per neuron over all layers in order, with its `tokens` and `suppressed`.
    """
    rows = decoded.select(["tokens", "suppressed"]).take(pa.array(neurons, pa.int64())).combine_chunks()
    # A neuron adds activation × row to the residual stream, so a negative activation flips the row's sign.
    negative = pa.array(np.asarray(activations, np.float64) < 0)
    return pc.if_else(negative, *(rows[name].combine_chunks() for name in ("suppressed", "tokens")))
