"""The decoder's end at chosen positions: logits and probabilities, and the final norm folded into the unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmray.models.layout import Projection
from mmray.models.loading import LoadedModel
from mmray.models.parts import gain_of, output_rows, unembedding_rows


def fold_norm(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], unembedding: Float[Tensor, "position hidden"]
) -> Float[Tensor, "position hidden"]:
    """Return vectors v with ⟨w, v⟩ = what writing w adds to the token's logit, with the final norm's scale fixed; fp32.

    `hidden` is the input of the final norm. Gain, division by the root mean square (for a LayerNorm: centring, and
    division by the standard deviation), a transform before the unembedding with its gates fixed, and the family's logit
    scale are applied.
    """
    direction = _through_transform(model, hidden, unembedding, folded=True)
    return _through(model.norm, hidden, direction) * model.parts.logit_scale


def without_norms(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], unembedding: Float[Tensor, "position hidden"]
) -> Float[Tensor, "position hidden"]:
    """Return vectors v with ⟨w, v⟩ = what writing w adds to the token's logit, without norms: the unembedding itself.

    Unless there is a transform before the unembedding: this is applied, with its gates fixed; fp32.
    """
    return _through_transform(model, hidden, unembedding, folded=False)


def _through_transform(
    model: LoadedModel,
    hidden: Float[Tensor, "position hidden"],
    direction: Float[Tensor, "position hidden"],
    *,
    folded: bool,
) -> Float[Tensor, "position hidden"]:
    """Return vectors v with ⟨x, v⟩ = ⟨transform(x), direction⟩ up to a constant, for outputs x of the final norm.

    `folded`: with the transform's own norm.
    """
    if (transform := model.transform) is None:
        return direction
    gates, entered = transform.gates(model.norm(hidden))
    if folded:
        direction = _through(transform.norm, entered, direction)
    return (direction.float() * gates) @ transform.matrix(hidden.dtype).float().T


def fold_block(
    model: LoadedModel,
    projection: Projection,
    mlp_out: Float[Tensor, "position hidden"] | None,
    direction: Float[Tensor, "position hidden"],
) -> Float[Tensor, "position hidden"]:
    """Return vectors v with ⟨w, v⟩ = ⟨what reaches the residual stream, direction⟩ if the projection writes w.

    Gemma 2 and 3 normalise the projection's output: `mlp_out` fixes that norm's scale. Mllama multiplies the output of
    its cross-attention blocks by a factor.
    """
    if projection.post_norm is not None and mlp_out is not None:
        direction = _through(model.network.get_submodule(projection.post_norm), mlp_out, direction)
    return direction * projection.scale


def norm_curvature(
    model: LoadedModel,
    projection: Projection,
    hidden: Float[Tensor, "position hidden"],
    mlp_out: Float[Tensor, "position hidden"] | None,
    slope: Float[Tensor, "position hidden"],
    activation: Float[Tensor, "position neuron"],
) -> Float[Tensor, "position neuron"]:
    """Return by how much removing each neuron's write lowers ⟨what is unembedded, slope⟩ beyond first order.

    The final norm divides by the root mean square r of its input h. Without the write a·w it divides by r', with
    r'² = r² - 2a⟨h, w⟩/d + a²‖w‖²/d. So the fall of ⟨norm(h), slope⟩ is exact for each neuron alone, and needs only
    products of its row with two vectors per position. A norm after the projection is fixed, as in `fold_block`, and so
    is a transform.
    """
    device, width = activation.device, hidden.shape[1]
    slope = _slope_before_transform(model, hidden, slope)
    hidden = _centred(model.norm, hidden.to(device).float())
    direction = _centred(model.norm, slope.to(device) * gain_of(model.norm).float().to(device))
    mlp_out = None if mlp_out is None else mlp_out.to(device)
    rows = output_rows(model.network, projection).to(device).float()

    def along(vectors: Float[Tensor, "position hidden"]) -> Float[Tensor, "position neuron"]:
        folded = fold_block(model, projection, mlp_out, vectors)
        return activation * (enough_rows(folded) @ rows.T)[: len(folded)]

    # What reaches the residual stream of a write w is, elementwise, w times this.
    factor = fold_block(model, projection, mlp_out, torch.ones_like(hidden))
    size = _centred(model.norm, rows) if projection.post_norm is None else rows
    # a²‖w‖²/d, a⟨h, w⟩/d and r² of the formula.
    size = (enough_rows(factor.square()) @ size.square().T)[: len(hidden)] * activation.square() / width
    shared, aligned = along(direction), along(hidden) / width
    square = hidden.square().mean(dim=1, keepdim=True) + _epsilon(model.norm)
    # Rounding can make r'² negative for a neuron that writes almost all of h.
    scale, after = square.rsqrt(), (square - 2 * aligned + size).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    total = (direction * hidden).sum(dim=1, keepdim=True)
    return total * (scale - after + aligned * scale**3) + shared * (after - scale)


def _slope_before_transform(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], slope: Float[Tensor, "position hidden"]
) -> Float[Tensor, "position hidden"]:
    """Return the gradient with respect to the final norm's output, given that with respect to what is unembedded."""
    if model.transform is None:
        return slope
    with torch.inference_mode(False), torch.enable_grad():
        normed = model.norm(hidden.clone()).detach().requires_grad_()
        after = model.transform.module(normed)
        gradient: Tensor = torch.autograd.grad(after, normed, slope.clone().to(after))[0]
    return gradient


def _centred(norm: nn.Module, vectors: Float[Tensor, "position hidden"]) -> Float[Tensor, "position hidden"]:
    """Return the vectors minus their mean for a LayerNorm, unchanged for an RMSNorm."""
    return vectors - vectors.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else vectors


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _through(
    norm: nn.Module, hidden: Float[Tensor, "position hidden"], direction: Float[Tensor, "position hidden"]
) -> Float[Tensor, "position hidden"]:
    """Return vectors v with ⟨w, v⟩ = ⟨norm(w), direction⟩, for the norm with its scale fixed at that of `hidden`."""
    hidden, gain = _centred(norm, hidden.float()), gain_of(norm).float().to(hidden.device)
    scale = (hidden.square().mean(dim=1, keepdim=True) + _epsilon(norm)).rsqrt()
    return _centred(norm, direction.float() * gain * scale)


TOKENS = 1 << 14
"""Rows of the unembedding converted to fp32 at a time."""
FEWEST_ROWS = 16
"""BLAS takes another path for fewer rows: a product's last bits would depend on what else is in the batch."""


def enough_rows(rows: Float[Tensor, "row column"]) -> Float[Tensor, "at_least_row column"]:
    """Return the rows, padded with zeros to at least FEWEST_ROWS."""
    return functional.pad(rows, (0, 0, 0, max(0, FEWEST_ROWS - len(rows))))


def log_probability(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], tokens: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """Return each token's log-probability in nats, from the final norm's input at the position that predicts it."""
    return _chosen(vocabulary_logits(model, hidden).log_softmax(dim=1), tokens)


def token_logits(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], tokens: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """Return the logit of each token, from the final norm's input at the position that predicts it."""
    return _chosen(vocabulary_logits(model, hidden), tokens)


def token_log_odds(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], tokens: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """Return log(p / (1 - p)) of each token, which unlike log p does not saturate where the model is certain."""
    logits = vocabulary_logits(model, hidden)
    # log(1 - p) from the other logits: 1 - p itself would round to zero.
    others = logits.scatter(1, tokens.to(logits.device)[:, None], -torch.inf)
    return _chosen(logits, tokens) - others.logsumexp(dim=1)


def log_odds_slope(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"], tokens: Int[Tensor, " position"]
) -> Float[Tensor, "position hidden"]:
    """Return the gradient of each token's log-odds with respect to what is unembedded; fp32."""
    logits = vocabulary_logits(model, hidden)
    own, cap = tokens.to(logits.device)[:, None], model.parts.logit_cap
    slope = -logits.scatter(1, own, -torch.inf).softmax(dim=1)
    slope = slope.scatter(1, own, 1.0) * (1 if cap is None else 1 - (logits / cap).square())
    table = unembedding_rows(model.network, model.parts)[: slope.shape[1]]
    total = torch.zeros(max(FEWEST_ROWS, len(slope)), table.shape[1], device=slope.device)
    # In slices: in fp32 the whole unembedding would take gigabytes.
    for part, rows in zip(torch.split(enough_rows(slope), TOKENS, dim=1), torch.split(table, TOKENS), strict=True):
        total += part @ rows.float()
    return total[: len(slope)] * model.parts.logit_scale


def unembedded(model: LoadedModel, hidden: Float[Tensor, "position hidden"]) -> Float[Tensor, "position hidden"]:
    """Return what the unembedding gets, from the input of the final norm at each position."""
    normed = model.norm(hidden)
    if model.transform is not None:
        normed = model.transform.module(normed)
    result: Tensor = normed * model.parts.logit_scale
    return result


def lens(model: LoadedModel) -> Float[Tensor, "vocabulary hidden"]:
    """Return per token the vector whose product with a write says how much this promotes the token; norms left out.

    That is the unembedding or, where there is a transform before it, its product with the transform's Linear.
    """
    table = unembedding_rows(model.network, model.parts)
    return table if model.transform is None else table @ model.transform.matrix(table.dtype).T


def vocabulary_logits(
    model: LoadedModel, hidden: Float[Tensor, "position hidden"]
) -> Float[Tensor, "position vocabulary"]:
    """Return the logits of all tokens in fp32, from the input of the final norm at each position."""
    normed = unembedded(model, hidden)
    # The module, not its weight: some heads have a bias.
    head = model.network.get_submodule(model.parts.unembedding)
    device = unembedding_rows(model.network, model.parts).device
    logits: Tensor = head(enough_rows(normed.to(device)))[: len(hidden)].float()
    cap = model.parts.logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chosen(
    logits: Float[Tensor, "position vocabulary"], tokens: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    return logits.gather(1, tokens.to(logits.device)[:, None])[:, 0]
