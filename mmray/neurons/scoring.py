"""One forward pass over a batch → the score of every neuron at every place where a concept is predicted."""

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
from mmray.models.norms import fold_block, fold_norm, log_odds_slope, log_probability, norm_curvature
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
    """What a forward leaves of a batch's places: a list entry a layer, [place, neuron] in fp32, and nats."""

    scores: list[Float[Tensor, "place neuron"]]
    activation: list[Float[Tensor, "place neuron"]]
    log_prob: Float[Tensor, " place"]


@phase("score")
@torch.inference_mode()
def score_batch(
    model: LoadedModel,
    batch: Batch,
    places: Sequence[TokenPosition],
    score: str = "contribution",
    *,
    folded: bool = False,
    statistics: TokenStatistics | None = None,
) -> Scored:
    """Run the batch once, teacher-forced, and score every neuron at these places.

    Some scores add a backward pass per noun. `statistics` must have been told of the batch.
    """
    if not SCORES[score].backward:
        with cache_activations(model, batch, places, statistics) as captured:
            forward(model, batch)
        return score_captured(model, captured, score, folded=folded)
    products, captured = gradient_pass(model, batch, places, score, statistics=statistics)
    if score == "effect":
        products = ablation_effects(model, captured, products)
    activations = [captured.activations[layer] for layer in range(len(model.widths))]
    return Scored(products, activations, log_probability(model, captured.hidden, captured.tokens))


@torch.inference_mode()
def ablation_effects(
    model: LoadedModel, captured: ActivationCache, products: Sequence[Float[Tensor, "place neuron"]]
) -> list[Float[Tensor, "place neuron"]]:
    """Return an estimate of what ablating each neuron alone takes from the token's log-odds at each place.

    `products` are the first-order effects. Added is what they leave of the final norm: a neuron that writes along the
    residual stream makes it longer, so that without it the norm divides by less. That part is exact; see
    `norm_curvature`. `python -m tests.bench.calibration` compares the estimate with real ablations.
    """
    slope = log_odds_slope(model, captured.hidden, captured.tokens)
    return [
        product
        + norm_curvature(
            model, projection, captured.hidden, captured.written.get(layer), slope, captured.activations[layer]
        ).to(product.device)
        for layer, (projection, product) in enumerate(zip(model.projections, products, strict=True))
    ]


@torch.inference_mode()
def score_captured(model: LoadedModel, captured: ActivationCache, score: str, *, folded: bool = False) -> Scored:
    """Score every neuron at the captured places by one of FUNCTIONS."""
    directions = _directions(model, captured, folded=folded)
    activations = [captured.activations[layer] for layer in range(len(model.widths))]
    scores = []
    for layer, (projection, activation) in enumerate(zip(model.projections, activations, strict=True)):
        gate = activation
        if score == "gate":
            gate = gate_function(model.network, projection)(captured.opened[layer]).float()
        rows = output_rows(model.network, projection).to(activation.device)
        projected = project(directions[layer].to(activation.device), rows)
        scores.append(FUNCTIONS[score](Located(activation, gate, projected, _seeds(captured.places, layer))))
    return Scored(scores, activations, log_probability(model, captured.hidden, captured.tokens))


def whole_nouns(places: Sequence[TokenPosition], scored: Scored) -> tuple[list[TokenPosition], Scored]:
    """Add up what the tokens of each noun were scored; the place and the activation are those of its first token."""
    first = [number for number, place in enumerate(places) if place.piece == 0]
    if len(first) == len(places):
        return list(places), scored
    sizes = [stop - start for start, stop in pairwise([*first, len(places)])]

    def added(values: Tensor) -> Tensor:
        return torch.stack([part.sum(dim=0) for part in torch.split(values, sizes)])

    activation = [part[first] for part in scored.activation]
    return [places[number] for number in first], Scored(
        [added(part) for part in scored.scores], activation, added(scored.log_prob)
    )


def unsound_rows(places: Sequence[TokenPosition], scored: Scored, rows: int) -> list[int]:
    """Return of each row of the batch how many neurons are not finite, score or activation, at its worst place."""
    counts = torch.zeros(len(places), dtype=torch.long, device=scored.log_prob.device)
    for score, activation in zip(scored.scores, scored.activation, strict=True):
        finite = score.isfinite().logical_and_(activation.isfinite())
        counts += finite.logical_not_().sum(1).to(counts.device)
    worst = [0] * rows
    for place, count in zip(places, counts.tolist(), strict=True):
        worst[place.row] = max(worst[place.row], count)
    return worst


def _directions(model: LoadedModel, captured: ActivationCache, *, folded: bool) -> list[Float[Tensor, "place hidden"]]:
    """Return, a list entry a layer, what a neuron's row is multiplied by to give its share of the token's logit."""
    table = unembedding_rows(model.network, model.parts)
    unembedding = table[captured.tokens.to(table.device)].float()
    if not folded:
        return [unembedding] * len(model.widths)
    final = fold_norm(model, captured.hidden.to(table.device), unembedding)
    written = {layer: output.to(table.device) for layer, output in captured.written.items()}
    return [
        fold_block(model, projection, written.get(layer), final) for layer, projection in enumerate(model.projections)
    ]


def _seeds(places: Sequence[TokenPosition], layer: int) -> Tensor:
    return torch.tensor([zlib.crc32(f"{place.sample_id} {place.position} {layer}".encode()) for place in places])
