"""The end of the decoder at chosen positions: the final norm folded into the unembedding, and probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.models.loading import LoadedModel
from mmray.models.parts import norm_gain, unembedding_rows


def fold_norm(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], unembedding: Float[Tensor, "place hidden"]
) -> Float[Tensor, "place hidden"]:
    """Return vectors v with ⟨w, v⟩ = what writing w adds to the logit after the final norm, its scale held as it is.

    `hidden` is the input of the final norm at each place. The gain, the division by the root mean square (by the
    standard deviation, and the centring, of a LayerNorm) and the family's logit scale are applied; fp32.
    """
    hidden, gain = hidden.float(), norm_gain(model.network, model.parts).float().to(hidden.device)
    epsilon = float(getattr(model.norm, "variance_epsilon", getattr(model.norm, "eps", 0.0)))
    centred = isinstance(model.norm, nn.LayerNorm)
    if centred:
        hidden = hidden - hidden.mean(dim=1, keepdim=True)
    folded = unembedding.float() * gain * (hidden.square().mean(dim=1, keepdim=True) + epsilon).rsqrt()
    if centred:
        folded = folded - folded.mean(dim=1, keepdim=True)
    return folded * model.parts.logit_scale


def log_probability(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], tokens: Int[Tensor, " place"]
) -> Float[Tensor, " place"]:
    """Return the log-probability in nats of each token, from the input of the final norm at the place before it."""
    logits = _logits(model, hidden)
    return _chosen(logits.log_softmax(dim=1), tokens)


def token_logits(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], tokens: Int[Tensor, " place"]
) -> Float[Tensor, " place"]:
    """Return the logit of each token, from the input of the final norm at the place before it."""
    return _chosen(_logits(model, hidden), tokens)


def _logits(model: LoadedModel, hidden: Float[Tensor, "place hidden"]) -> Float[Tensor, "place vocabulary"]:
    normed = model.norm(hidden) * model.parts.logit_scale
    head = model.network.get_submodule(model.parts.unembedding)
    logits: Tensor = head(normed.to(unembedding_rows(model.network, model.parts).device)).float()
    cap = model.parts.logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chosen(logits: Float[Tensor, "place vocabulary"], tokens: Int[Tensor, " place"]) -> Float[Tensor, " place"]:
    return logits.gather(1, tokens.to(logits.device)[:, None])[:, 0]
