"""What every neuron writes: the tokens that its row of W_out raises and lowers most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from mmray.features.census.tables import PARTS
from mmray.models.generation import token_text
from mmray.models.layout import Projection
from mmray.models.loading import LoadedModel
from mmray.models.parts import gain_of, output_rows, unembedding_rows

DECODED = 10
"""Tokens listed at each end."""
CHUNK = 1 << 27
"""Numbers of a neuron × vocabulary block held at a time (512 MB in fp32)."""


@torch.inference_mode()
def decode_neurons(model: LoadedModel, *, fold_norm: bool) -> pa.Table:
    """Return a row a neuron, over all layers in order: the ten tokens it promotes and the ten it suppresses.

    Rows of W_out times W_U^T (Geva et al. 2022), in fp32, for half precision has ties. `fold_norm` first applies what
    lies between: the block's own norm and weight, where it has them, and the final norm's gain.
    """
    unembedding = unembedding_rows(model.network, model.parts)[: len(model.tokenizer)].float()
    texts = [token_text(model, token) for token in range(len(unembedding))]
    columns: dict[str, list[list[str]]] = {"tokens": [], "suppressed": []}
    for projection, rows in _chunks(model, len(unembedding)):
        written = rows.float()
        if fold_norm:
            if projection.post_norm is not None:
                written = _normed(model.network.get_submodule(projection.post_norm), written)
            written = _normed(model.norm, written * projection.scale)
        logits = written.to(unembedding) @ unembedding.T
        for name, largest in (("tokens", True), ("suppressed", False)):
            best = logits.topk(min(DECODED, logits.shape[1]), dim=1, largest=largest).indices
            columns[name].extend([texts[token] for token in row] for row in best.tolist())
    return pa.table(columns, schema=PARTS["decoded"])


def written(decoded: pa.Table, neurons: Sequence[int] | ndarray, activations: Sequence[float] | ndarray) -> pa.Array:
    """Return the ten tokens that each neuron writes at this activation: below zero, those that its row suppresses.

    `decoded` has a row for each neuron over all layers in order, with its `tokens` and `suppressed`. A neuron adds
    activation × row to the residual stream, so a negative activation turns the row around.
    """
    rows = decoded.select(["tokens", "suppressed"]).take(pa.array(neurons, pa.int64())).combine_chunks()
    negative = pa.array(np.asarray(activations, np.float64) < 0)
    return pc.if_else(negative, *(rows[name].combine_chunks() for name in ("suppressed", "tokens")))


def _normed(norm: nn.Module, written: Float[Tensor, "neuron hidden"]) -> Float[Tensor, "neuron hidden"]:
    """Return what a norm makes of these rows but for its division, which is the same for all tokens."""
    gain = gain_of(norm).float()
    written = written.to(gain)
    centre = written.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0.0
    return (written - centre) * gain


def _chunks(model: LoadedModel, vocabulary: int) -> Iterator[tuple[Projection, Float[Tensor, "neuron hidden"]]]:
    for projection in model.projections:
        for rows in torch.split(output_rows(model.network, projection), max(1, CHUNK // vocabulary)):
            yield projection, rows
