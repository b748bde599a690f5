"""Score every neuron at every position of a batch where a concept is predicted, in one forward pass."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.engine.clock import phase
from mmray.models.capture import gate_function
from mmray.models.loading import LoadedModel
from mmray.models.norms import fold_block, fold_norm, log_odds_slope, log_probability, norm_curvature, without_norms
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.attribution import FUNCTIONS, Located, project
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.scores import SCORES
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition


@dataclass(frozen=True)
class Scored:
    """Scores and activations of a batch's positions, one entry per layer, in fp32; log-probabilities in nats."""

    scores: list[Float[Tensor, "position neuron"]]
    activation: list[Float[Tensor, "position neuron"]]
    log_prob: Float[Tensor, " position"]


@phase("score")
@torch.inference_mode()
def score_batch(
    model: LoadedModel,
    batch: Batch,
    positions: Sequence[TokenPosition],
    score: str = "contribution",
    *,
    folded: bool = False,
    statistics: TokenStatistics | None = None,
) -> Scored:
    """Run the batch once, teacher-forced, and score every neuron at these positions.

    Some scores need a backward pass per noun too. `statistics` must have been given the batch (`begin`).
    """
    if not SCORES[score].backward:
        with cache_activations(model, batch, positions, statistics, gates=score == "gate") as cache:
            forward(model, batch)
        return score_captured(model, cache, score, folded=folded)
    products, cache = gradient_pass(model, batch, positions, score, statistics=statistics)
    if score == "effect":
        products = ablation_effects(model, cache, products)
    activations = [cache.activations[layer] for layer in range(len(model.widths))]
    return Scored(products, activations, log_probability(model, cache.hidden, cache.tokens))


@torch.inference_mode()
def ablation_effects(
    model: LoadedModel, cache: ActivationCache, products: Sequence[Float[Tensor, "position neuron"]]
) -> list[Float[Tensor, "position neuron"]]:
    """Return an estimate of how much ablating each neuron alone lowers the token's log-odds at each position.

    `products` are the first-order effects. They miss the final norm's scale: a neuron that writes along the residual
    stream lengthens it, so without the neuron the norm divides by less. `norm_curvature` adds that part exactly.
    `python -m tests.bench.calibration` compares the estimate with real ablations. Of decoders with several streams, the
    estimate is first-order.
    """
    if cache.mix is not None:
        return list(products)
    slope = log_odds_slope(model, cache.hidden, cache.tokens)
    effects = []
    for layer, (projection, product) in enumerate(zip(model.projections, products, strict=True)):
        mlp_out, activation = cache.mlp_out.get(layer), cache.activations[layer]
        curvature = norm_curvature(model, projection, cache.hidden, mlp_out, slope, activation)
        effects.append(product + curvature.to(product.device))
    return effects


@torch.inference_mode()
def score_captured(model: LoadedModel, cache: ActivationCache, score: str, *, folded: bool = False) -> Scored:
    """Score every neuron at the cached positions by one of FUNCTIONS."""
    directions = _directions(model, cache, folded=folded)
    activations = [cache.activations[layer] for layer in range(len(model.widths))]
    scores = []
    for layer, (projection, activation) in enumerate(zip(model.projections, activations, strict=True)):
        # A plain MLP's gate is its activation; the other scores don't read it.
        gate = activation
        if score == "gate":
            gate = gate_function(model.network, projection)(cache.gate[layer]).float()
        rows = output_rows(model.network, projection).to(activation.device)
        projected = project(directions[layer].to(activation.device), rows)
        scores.append(FUNCTIONS[score](Located(activation, gate, projected, _seeds(cache.positions, layer))))
    return Scored(scores, activations, log_probability(model, cache.hidden, cache.tokens))


def whole_nouns(positions: Sequence[TokenPosition], scored: Scored) -> tuple[list[TokenPosition], Scored]:
    """Sum scores and log-probabilities over each noun's tokens; position and activation are the first token's."""
    first = [number for number, occurrence in enumerate(positions) if occurrence.piece == 0]
    if len(first) == len(positions):
        return list(positions), scored
    sizes = [stop - start for start, stop in pairwise([*first, len(positions)])]

    def summed(values: Tensor) -> Tensor:
        return torch.stack([part.sum(dim=0) for part in torch.split(values, sizes)])

    scores, activations = [summed(part) for part in scored.scores], [part[first] for part in scored.activation]
    return [positions[number] for number in first], Scored(scores, activations, summed(scored.log_prob))


def non_finite_rows(positions: Sequence[TokenPosition], scored: Scored, rows: int) -> list[int]:
    """Return per row of the batch how many neurons have a non-finite score or activation, at its worst position."""
    counts = torch.zeros(len(positions), dtype=torch.long, device=scored.log_prob.device)
    for score, activation in zip(scored.scores, scored.activation, strict=True):
        # NaN and infinity survive in sums, which take a fraction of the time of looking at each number.
        if (score.sum() + activation.sum()).isfinite():
            continue
        finite = score.isfinite().logical_and_(activation.isfinite())
        counts += finite.logical_not_().sum(1).to(counts.device)
    worst = [0] * rows
    for occurrence, count in zip(positions, counts.tolist(), strict=True):
        worst[occurrence.row] = max(worst[occurrence.row], count)
    return worst


def _directions(model: LoadedModel, cache: ActivationCache, *, folded: bool) -> list[Float[Tensor, "position hidden"]]:
    """Return per layer the vectors whose product with a neuron's row is its share of the token's logit."""
    table = unembedding_rows(model.network, model.parts)
    unembedding = table[cache.tokens.to(table.device)].float()
    if not folded:
        return [without_norms(model, cache.hidden.to(table.device), unembedding)] * len(model.widths)
    return folded_directions(model, cache, unembedding)


def folded_directions(
    model: LoadedModel, cache: ActivationCache, unembedding: Float[Tensor, "position hidden"]
) -> list[Float[Tensor, "position hidden"]]:
    """Return per layer vectors v with ⟨w, v⟩ = what a row w adds to ⟨what is unembedded, unembedding⟩.

    All norms are applied with their scales at the positions, and all streams with their weights there.
    """
    final = fold_norm(model, cache.hidden.to(unembedding.device), unembedding)
    mlp_out = {layer: output.to(final.device) for layer, output in cache.mlp_out.items()}
    layers = [final] * len(model.widths) if cache.mix is None else cache.mix.by_layer(final)
    return [
        fold_block(model, projection, mlp_out.get(layer), layers[layer])
        for layer, projection in enumerate(model.projections)
    ]


def _seeds(positions: Sequence[TokenPosition], layer: int) -> Tensor:
    names = (f"{occurrence.sample_id} {occurrence.position} {layer}" for occurrence in positions)
    # Not `hash`, which differs between workers.
    return torch.tensor([zlib.crc32(name.encode()) for name in names])
