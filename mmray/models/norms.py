"""The end of the decoder at chosen positions: the final norm folded into the unembedding, and probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmray.models.layout import Projection
from mmray.models.loading import LoadedModel
from mmray.models.parts import gain_of, unembedding_rows


def fold_norm(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], unembedding: Float[Tensor, "place hidden"]
) -> Float[Tensor, "place hidden"]:
    """Return vectors v with ⟨w, v⟩ = what writing w adds to the logit after the final norm, its scale held as it is.

    `hidden` is the input of the final norm at each place. The gain, the division by the root mean square (by the
    standard deviation, and the centring, of a LayerNorm) and the family's logit scale are applied; fp32.
    """
    return _through(model.norm, hidden, unembedding) * model.parts.logit_scale


def fold_block(
    model: LoadedModel,
    projection: Projection,
    written: Float[Tensor, "place hidden"] | None,
    direction: Float[Tensor, "place hidden"],
) -> Float[Tensor, "place hidden"]:
    """Return vectors v with ⟨w, v⟩ = ⟨what reaches the residual stream, direction⟩ where the projection writes w.

    `written` is the projection's output at each place, which the norm of Gemma 2 and 3 behind it is held at; Mllama
    weighs the output of its cross-attention blocks.
    """
    if projection.post_norm is not None and written is not None:
        direction = _through(model.network.get_submodule(projection.post_norm), written, direction)
    return direction * projection.scale


def _through(
    norm: nn.Module, hidden: Float[Tensor, "place hidden"], direction: Float[Tensor, "place hidden"]
) -> Float[Tensor, "place hidden"]:
    """Return vectors v with ⟨w, v⟩ = ⟨norm's linear part of w, direction⟩, the norm's scale that of `hidden`."""
    hidden, gain = hidden.float(), gain_of(norm).float().to(hidden.device)
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
    centred = isinstance(norm, nn.LayerNorm)
    if centred:
        hidden = hidden - hidden.mean(dim=1, keepdim=True)
    folded = direction.float() * gain * (hidden.square().mean(dim=1, keepdim=True) + epsilon).rsqrt()
    if centred:
        folded = folded - folded.mean(dim=1, keepdim=True)
    return folded


FEWEST_ROWS = 16
"""Of fewer rows BLAS takes another path, and the bits of a product would depend on what shares the batch."""


def enough_rows(rows: Float[Tensor, "row column"]) -> Float[Tensor, "at_least_row column"]:
    """Return the rows with rows of zeros behind them where they are fewer than FEWEST_ROWS."""
    return functional.pad(rows, (0, 0, 0, max(0, FEWEST_ROWS - len(rows))))


def log_probability(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], tokens: Int[Tensor, " place"]
) -> Float[Tensor, " place"]:
    """Return the log-probability in nats of each token, from the input of the final norm at the place before it."""
    logits = vocabulary_logits(model, hidden)
    return _chosen(logits.log_softmax(dim=1), tokens)


def token_logits(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], tokens: Int[Tensor, " place"]
) -> Float[Tensor, " place"]:
    """Return the logit of each token, from the input of the final norm at the place before it."""
    return _chosen(vocabulary_logits(model, hidden), tokens)


def token_log_odds(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], tokens: Int[Tensor, " place"]
) -> Float[Tensor, " place"]:
    """Return log(p / (1 - p)) of each token, which unlike log p does not flatten where the model is sure."""
    logits = vocabulary_logits(model, hidden)
    others = logits.scatter(1, tokens.to(logits.device)[:, None], -torch.inf)
    return _chosen(logits, tokens) - others.logsumexp(dim=1)


def vocabulary_logits(model: LoadedModel, hidden: Float[Tensor, "place hidden"]) -> Float[Tensor, "place vocabulary"]:
    """Return the logits of all tokens in fp32, from the input of the final norm at each place."""
    normed = model.norm(hidden) * model.parts.logit_scale
    head = model.network.get_submodule(model.parts.unembedding)
    device = unembedding_rows(model.network, model.parts).device
    logits: Tensor = head(enough_rows(normed.to(device)))[: len(hidden)].float()
    cap = model.parts.logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chosen(logits: Float[Tensor, "place vocabulary"], tokens: Int[Tensor, " place"]) -> Float[Tensor, " place"]:
    return logits.gather(1, tokens.to(logits.device)[:, None])[:, 0]
