"""The end of the decoder at chosen positions: the final norm folded into the unembedding, and probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmray.models.layout import Projection
from mmray.models.loading import LoadedModel
from mmray.models.parts import gain_of, output_rows, unembedding_rows


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


def norm_curvature(
    model: LoadedModel,
    projection: Projection,
    hidden: Float[Tensor, "place hidden"],
    written: Float[Tensor, "place hidden"] | None,
    slope: Float[Tensor, "place hidden"],
    activation: Float[Tensor, "place neuron"],
) -> Float[Tensor, "place neuron"]:
    """Return what removing each neuron's write takes from ⟨output of the final norm, slope⟩ beyond first order.

    The final norm divides by the root mean square r of its input h; without the write a·w it divides by r', with
    r'² = r² - 2a⟨h, w⟩/d + a²‖w‖²/d. So the fall of ⟨norm(h), slope⟩ is exact for each neuron alone, from products of
    its row with two vectors a place. A norm or weight behind the projection is held, as in `fold_block`.
    """
    device, width = activation.device, hidden.shape[1]
    hidden = _centred(model.norm, hidden.to(device).float())
    direction = _centred(model.norm, slope.to(device) * gain_of(model.norm).float().to(device))
    written = None if written is None else written.to(device)
    rows = output_rows(model.network, projection).to(device).float()

    def along(vectors: Float[Tensor, "place hidden"]) -> Float[Tensor, "place neuron"]:
        folded = fold_block(model, projection, written, vectors)
        return activation * (enough_rows(folded) @ rows.T)[: len(folded)]

    # Of a write w behind a norm, element by element w times this.
    factor = fold_block(model, projection, written, torch.ones_like(hidden))
    size = _centred(model.norm, rows) if projection.post_norm is None else rows
    size = (enough_rows(factor.square()) @ size.square().T)[: len(hidden)] * activation.square() / width
    shared, aligned = along(direction), along(hidden) / width
    square = hidden.square().mean(dim=1, keepdim=True) + _epsilon(model.norm)
    scale, after = square.rsqrt(), (square - 2 * aligned + size).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    total = (direction * hidden).sum(dim=1, keepdim=True)
    return total * (scale - after + aligned * scale**3) + shared * (after - scale)


def _centred(norm: nn.Module, vectors: Float[Tensor, "place hidden"]) -> Float[Tensor, "place hidden"]:
    """Return the vectors less their mean where the norm centres its input, as a LayerNorm does."""
    return vectors - vectors.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else vectors


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _through(
    norm: nn.Module, hidden: Float[Tensor, "place hidden"], direction: Float[Tensor, "place hidden"]
) -> Float[Tensor, "place hidden"]:
    """Return vectors v with ⟨w, v⟩ = ⟨norm's linear part of w, direction⟩, the norm's scale that of `hidden`."""
    hidden, gain = _centred(norm, hidden.float()), gain_of(norm).float().to(hidden.device)
    scale = (hidden.square().mean(dim=1, keepdim=True) + _epsilon(norm)).rsqrt()
    return _centred(norm, direction.float() * gain * scale)


TOKENS = 1 << 14
"""Rows of the unembedding that are held in fp32 at a time."""
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


def log_odds_slope(
    model: LoadedModel, hidden: Float[Tensor, "place hidden"], tokens: Int[Tensor, " place"]
) -> Float[Tensor, "place hidden"]:
    """Return the gradient of each token's log-odds with respect to the output of the final norm; fp32."""
    logits = vocabulary_logits(model, hidden)
    own, cap = tokens.to(logits.device)[:, None], model.parts.logit_cap
    slope = -logits.scatter(1, own, -torch.inf).softmax(dim=1)
    slope = slope.scatter(1, own, 1.0) * (1 if cap is None else 1 - (logits / cap).square())
    table = unembedding_rows(model.network, model.parts)[: slope.shape[1]]
    total = torch.zeros(max(FEWEST_ROWS, len(slope)), table.shape[1], device=slope.device)
    # Some tokens at a time: in fp32 the whole table would take gigabytes.
    for part, rows in zip(torch.split(enough_rows(slope), TOKENS, dim=1), torch.split(table, TOKENS), strict=True):
        total += part @ rows.float()
    return total[: len(slope)] * model.parts.logit_scale


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
