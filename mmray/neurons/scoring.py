"""One forward pass over a batch → the score of every neuron at every place where a concept is predicted."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.models.capture import gate_function, tap, tap_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import fold_block, fold_norm, log_probability
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.prompting import Batch
from mmray.neurons.attribution import GRADIENTS, SCORES, Located, project
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.places import Place
from mmray.neurons.statistics import TokenStatistics


@dataclass(frozen=True)
class Scored:
    """What a forward leaves of a batch's places: a list entry a layer, [place, neuron] in fp32, and nats."""

    scores: list[Float[Tensor, "place neuron"]]
    activation: list[Float[Tensor, "place neuron"]]
    log_prob: Float[Tensor, " place"]


@torch.inference_mode()
def score_batch(
    model: LoadedModel,
    batch: Batch,
    places: Sequence[Place],
    score: str = "contribution",
    *,
    folded: bool = False,
    statistics: TokenStatistics | None = None,
) -> Scored:
    """Run the batch once, teacher-forced, and score every neuron at these places.

    Activations of the chosen positions alone are kept, on the device, as each layer computes them; `statistics` sees
    the layers in passing and must have been told of the batch. The gradient scores take a backward pass a noun besides.
    """
    if score in GRADIENTS:
        last = score == "gradient-last"
        scores, activation, states = gradient_pass(model, batch, places, last=last, statistics=statistics)
        return Scored(scores, activation, log_probability(model, states, _tokens(places)))
    positions = torch.tensor([place.row * batch.positions + place.position for place in places], dtype=torch.long)
    activations: dict[int, Tensor] = {}
    opens: dict[int, Tensor] = {}
    hidden: list[Tensor] = []
    written: dict[int, Tensor] = {}
    with_gate = score == "gate"

    def receive(layer: int, activation: Tensor, opened: Tensor) -> None:
        index = positions.to(activation.device)
        activations[layer] = activation[index].float()
        if with_gate:
            opens[layer] = gate_function(model.network, model.projections[layer])(opened[index]).float()
        if statistics is not None:
            statistics.add(layer, activation, opened)

    def receive_final(states: Tensor) -> None:
        hidden.append(states.flatten(0, -2)[positions.to(states.device)])

    def receive_written(layer: int, output: Tensor) -> None:
        written[layer] = output.flatten(0, -2)[positions.to(output.device)]

    with ExitStack() as stack:
        stack.enter_context(tap(model.network, model.projections, receive))
        stack.enter_context(tap_input(model.norm, receive_final))
        for layer, projection in enumerate(model.projections):
            if folded and projection.post_norm is not None:
                norm = model.network.get_submodule(projection.post_norm)
                stack.enter_context(tap_input(norm, partial(receive_written, layer)))
        forward(model, batch)
    # Without an image Mllama leaves its cross-attention blocks out: their neurons do nothing.
    for layer in sorted(set(range(len(model.widths))) - set(activations)):
        nothing = hidden[-1].new_zeros(len(batch.tokens) * batch.positions, model.widths[layer])
        receive(layer, nothing, nothing)
    directions = _directions(model, places, hidden[-1], written, folded=folded)
    return _score(model, places, activations, opens, directions, score, hidden[-1])


def forward(model: LoadedModel, batch: Batch) -> Any:
    """Run the network on a batch, without the cache, and the logits of positions, that nobody asked for."""
    extra: dict[str, Any] = {}
    parameters = inspect.signature(model.network.forward).parameters
    if "logits_to_keep" in parameters:
        extra["logits_to_keep"] = 1
    # Many a network does not name it, and hands on to its decoder what it does not know.
    if "use_cache" in parameters or any(named.kind is named.VAR_KEYWORD for named in parameters.values()):
        extra["use_cache"] = False
    return model.network(**batch.to(model.device, model.network.dtype), **extra)


def _directions(
    model: LoadedModel, places: Sequence[Place], hidden: Tensor, written: dict[int, Tensor], *, folded: bool
) -> list[Float[Tensor, "place hidden"]]:
    """Return, a list entry a layer, what a neuron's row is multiplied by to give its share of the token's logit."""
    table = unembedding_rows(model.network, model.parts)
    unembedding = table[_tokens(places).to(table.device)].float()
    if not folded:
        return [unembedding] * len(model.widths)
    final = fold_norm(model, hidden.to(table.device), unembedding)
    return [
        fold_block(model, projection, written[layer].to(table.device) if layer in written else None, final)
        for layer, projection in enumerate(model.projections)
    ]


def _score(
    model: LoadedModel,
    places: Sequence[Place],
    activations: dict[int, Tensor],
    opens: dict[int, Tensor],
    directions: list[Tensor],
    score: str,
    hidden: Tensor,
) -> Scored:
    function = SCORES[score]
    scores = []
    for layer, projection in enumerate(model.projections):
        activation, rows = activations[layer], output_rows(model.network, projection)
        located = Located(
            activation=activation,
            gate=opens[layer] if opens else activation,
            projection=project(directions[layer].to(activation.device), rows.to(activation.device)),
            seeds=_seeds(places, layer),
        )
        scores.append(function(located))
    at_places = [activations[layer] for layer in range(len(scores))]
    return Scored(scores, at_places, log_probability(model, hidden, _tokens(places)))


def _tokens(places: Sequence[Place]) -> Int[Tensor, " place"]:
    return torch.tensor([place.token for place in places], dtype=torch.long)


def _seeds(places: Sequence[Place], layer: int) -> Tensor:
    return torch.tensor([zlib.crc32(f"{place.sample_id} {place.position} {layer}".encode()) for place in places])
