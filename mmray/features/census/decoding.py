"""The tokens that each neuron writes: those that its row of W_out promotes and suppresses most."""

from __future__ import annotations

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.features.census.tables import PARTS
from mmray.models.generation import token_text
from mmray.models.loading import LoadedModel
from mmray.models.norms import lens
from mmray.models.parts import gain_of, output_rows

DECODED = 10
"""Tokens listed at each end."""
CHUNK = 1 << 27
"""Elements of the neuron × vocabulary block held at a time (512 MB in fp32)."""


@torch.inference_mode()
def decode_neurons(model: LoadedModel, *, fold_norm: bool) -> pa.Table:
    """Return one row per neuron, over all layers in order: the ten tokens it promotes and the ten it suppresses.

    The tokens are ordered by row of W_out · W_Uᵀ (Geva et al. 2022). `fold_norm` first applies what lies between the
    two: the block's own norm and weight, if it has them, and the final norm's gain.
    """
    # Some checkpoints pad the vocabulary; rows past the tokenizer's are no tokens.
    unembedding = lens(model)[: len(model.tokenizer)].float()
    # Decoded once per token, not once per neuron.
    texts = [token_text(model, token) for token in range(len(unembedding))]
    columns: dict[str, list[list[str]]] = {"tokens": [], "suppressed": []}
    chunk = max(1, CHUNK // len(unembedding))
    for projection in model.projections:
        for rows in torch.split(output_rows(model.network, projection), chunk):
            directions = rows.float()  # in half precision many logits tie
            if fold_norm:
                if projection.post_norm is not None:
                    directions = _normed(model.network.get_submodule(projection.post_norm), directions)
                directions = _normed(model.norm, directions * projection.scale)
            logits = directions.to(unembedding) @ unembedding.T
            for name, largest in (("tokens", True), ("suppressed", False)):
                extreme = logits.topk(min(DECODED, logits.shape[1]), dim=1, largest=largest).indices
                columns[name].extend([texts[token] for token in row] for row in extreme.tolist())
    return pa.table(columns, schema=PARTS["decoded"])


def _normed(norm: nn.Module, directions: Float[Tensor, "neuron hidden"]) -> Float[Tensor, "neuron hidden"]:
    """Apply a norm to these rows without its division, which scales all tokens alike and cannot change their order."""
    gain = gain_of(norm).float()
    directions = directions.to(gain)
    centre = directions.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0.0
    return (directions - centre) * gain
