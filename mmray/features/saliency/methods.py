"""The methods of saliency as a table: each makes the map of one place's word from a look at its batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.detector.detection import Detection
from mmray.errors import InputError
from mmray.features.saliency.attention import attention_rollout
from mmray.features.saliency.gradient_alignment import Outputs, box_cosines
from mmray.features.saliency.maps import Saliency, gradient_input, gradient_norm, paint, spread
from mmray.features.saliency.saliency_input import JointInput, SaliencyInput
from mmray.neurons.activation_cache import cache_activations
from mmray.neurons.heatmaps import Map, MapRequest, patch_maps
from mmray.neurons.scoring import score_captured
from mmray.neurons.token_positions import TokenPosition

NEURONS = 10
"""Neurons whose mean activation is a map (Pan et al. 2024)."""

Located: TypeAlias = Mapping[str, tuple[Sequence[tuple[int, int]], Sequence[float]]]
"""Concept → its highest neurons in a run's ranking, each with the sign of its activation."""


@dataclass
class Explained:
    """A look with what its methods share; `words` are what the detector is asked for, one a place."""

    look: SaliencyInput
    words: Sequence[str]
    located: Located = field(default_factory=dict)
    """Empty: the neurons that are highest at the place itself."""

    @property
    def joint(self) -> JointInput:
        """The look through a joint model. Raises InputError where there is no detector."""
        if not isinstance(self.look, JointInput):
            raise InputError(f"{self.look.model.name}: no detector for it; give --detector, or another --method")
        return self.look

    def query(self, number: int) -> Float[Tensor, "1 dim"]:
        """Return what the detector looks for at a place."""
        return self.joint.joint.detector.queries([self.words[number]])

    @torch.no_grad()
    def detection(self, number: int) -> Detection:
        """Return the boxes of a place's row, with their logits for its word."""
        row = self.look.places[number].row
        found: Detection = self.joint.joint.detector(self.look.seen[row : row + 1].float(), self.query(number))
        return found

    @cached_property
    def rolled_out(self) -> list[Float[Tensor, "query key"]]:
        """Attention rollout of each row."""
        return attention_rollout(self.look)

    @cached_property
    def neuron_maps(self) -> list[Map]:
        """The mean activation of each place's neurons over the patches."""
        look, places = self.look, self.look.places
        missing = [place for place in places if place.concept not in self.located]
        highest = iter(highest_neurons(look, missing) if missing else ())
        chosen = [self.located.get(place.concept) or next(highest) for place in places]
        wanted = [
            MapRequest(place.row, look.tokens[place.row], names[:NEURONS], signs[:NEURONS])
            for place, (names, signs) in zip(places, chosen, strict=True)
        ]
        return patch_maps(look.model, look.batch, wanted, lambda: look.run(look.seen))

    def rows(self, number: int) -> int:
        """Return how many rows the grid of a place has."""
        return self.look.grid(self.look.places[number].row).rows


def highest_neurons(
    look: SaliencyInput, places: Sequence[TokenPosition]
) -> list[tuple[list[tuple[int, int]], list[float]]]:
    """Return the neurons that give most to each place's token, with the signs of their activations."""
    with torch.inference_mode(), cache_activations(look.model, look.batch, places) as captured:
        look.run(look.seen)
    scored = score_captured(look.model, captured, "contribution")
    scores = torch.cat([layer.cpu() for layer in scored.scores], dim=1)
    activations = torch.cat([layer.cpu() for layer in scored.activation], dim=1)
    owners = [(layer, unit) for layer, width in enumerate(look.model.widths) for unit in range(width)]
    found = []
    for own, best in zip(activations, scores.topk(NEURONS, dim=1).indices.tolist(), strict=True):
        found.append(([owners[index] for index in best], [1.0 if own[index] >= 0 else -1.0 for index in best]))
    return found


Method: TypeAlias = Callable[[Explained, int], Saliency]


def alignment(looked: Explained, number: int) -> Saliency:
    """Weigh each box by the cosine of the word's gradient with that of the box's logit for the word."""
    return _aligned(looked, number, "class")


def alignment_boxes(looked: Explained, number: int) -> Saliency:
    """Weigh each box by the highest cosine of the word's gradient with those of its four coordinates."""
    return _aligned(looked, number, "boxes")


def alignment_any(looked: Explained, number: int) -> Saliency:
    """Weigh each box by the highest cosine of the word's gradient with those of its logit and its four coordinates."""
    return _aligned(looked, number, "any")


def _aligned(looked: Explained, number: int, outputs: Outputs) -> Saliency:
    look, place = looked.joint, looked.look.places[number]
    detector, seen, skipped = look.joint.detector, look.seen[place.row], look.joint.tower.skipped
    found, boxes = box_cosines(detector, seen, looked.query(number), look.gradients[number], outputs, skipped)
    weights = found.max(dim=1).values
    return Saliency(paint(boxes, weights), weights, boxes)


def detector(looked: Explained, number: int) -> Saliency:
    """Weigh each box by the detector's confidence that it shows the word: the language model has no part in it."""
    found = looked.detection(number)
    weights = found.logits[0, :, 0].sigmoid()
    return Saliency(paint(found.boxes[0], weights), weights, found.boxes[0])


def random(looked: Explained, number: int) -> Saliency:
    """Weigh the detector's boxes at random: the control of all that weigh boxes."""
    found = looked.detection(number)
    weights = _drawn(looked, number, found.boxes.shape[1]).to(found.boxes)
    return Saliency(paint(found.boxes[0], weights), weights, found.boxes[0])


def random_patches(looked: Explained, number: int) -> Saliency:
    """Weigh each patch at random: the control where there is no detector."""
    grid = looked.look.grid(looked.look.places[number].row)
    return Saliency(spread(_drawn(looked, number, grid.rows * grid.columns), grid.rows))


def _drawn(looked: Explained, number: int, count: int) -> Float[Tensor, " weight"]:
    """Return weights that are drawn for a place, the same at every call."""
    place = looked.look.places[number]
    seed = zlib.crc32(f"{place.sample_id} {place.position} {place.concept}".encode())
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def gradient(looked: Explained, number: int) -> Saliency:
    """Weigh each patch by the length of the gradient there."""
    return _patches(looked, number, gradient_norm)


def gradient_times_input(looked: Explained, number: int) -> Saliency:
    """Weigh each patch by gradient × input."""
    return _patches(looked, number, gradient_input)


def _patches(looked: Explained, number: int, weigh: Callable[[Tensor, Tensor], Tensor]) -> Saliency:
    look = looked.look
    seen = look.patches(look.seen, look.places[number].row).float()
    return Saliency(spread(weigh(look.gradients[number], seen), looked.rows(number)))


def rollout(looked: Explained, number: int) -> Saliency:
    """Weigh each patch by the attention that reaches the place from its token, rolled out over the layers."""
    look, place = looked.look, looked.look.places[number]
    reached = looked.rolled_out[place.row][place.position]
    return Saliency(spread(reached[torch.tensor(look.tokens[place.row].positions)], look.tokens[place.row].rows))


def neurons(looked: Explained, number: int) -> Saliency:
    """Weigh each patch by the mean activation of the word's ten highest neurons, each with its sign."""
    found = looked.neuron_maps[number]
    return Saliency(spread(found.flatten(), found.shape[0]))


METHODS: dict[str, Method] = {
    "alignment": alignment,
    "alignment-boxes": alignment_boxes,
    "alignment-any": alignment_any,
    "gradient": gradient,
    "gradient-input": gradient_times_input,
    "detector": detector,
    "rollout": rollout,
    "neurons": neurons,
    "random": random,
    "random-patches": random_patches,
}
"""Every method by its name."""

OF_BOXES = ("alignment", "alignment-boxes", "alignment-any", "detector", "random")
"""Methods that need a detector."""


def method_of(name: str) -> Method:
    """Return a method by its name. Raises InputError for one that there is not."""
    if name not in METHODS:
        raise InputError(f"no method of saliency {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
