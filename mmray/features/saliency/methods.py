"""The saliency methods as a table: each maps the evidence for one target's word."""

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
from mmray.features.saliency.gradient_alignment import Outputs, box_cosines
from mmray.features.saliency.maps import Saliency, paint, rollout, spread
from mmray.features.saliency.saliency_input import JointInput, SaliencyInput
from mmray.neurons.activation_cache import cache_activations
from mmray.neurons.heatmaps import Map, MapRequest, min_max, patch_maps
from mmray.neurons.scoring import score_captured
from mmray.neurons.token_positions import TokenPosition

NEURONS = 10
"""Neurons whose mean activation is the map of `neurons` (Pan et al. 2024)."""

Located: TypeAlias = Mapping[str, tuple[Sequence[tuple[int, int]], Sequence[float]]]
"""Concept → its highest neurons in a run's ranking, and the signs of their activations."""


@dataclass
class Explained:
    """A saliency input with what its methods share; `words` are the detector's queries, one per target."""

    input: SaliencyInput
    words: Sequence[str]
    located: Located = field(default_factory=dict)
    """Concepts missing here get the neurons that score highest at the target itself."""

    @property
    def joint(self) -> JointInput:
        """The input as one on a joint model. Raises InputError where there is no detector."""
        if not isinstance(self.input, JointInput):
            raise InputError(f"{self.input.model.name}: no detector for it; give --detector, or another --method")
        return self.input

    def query(self, index: int) -> Float[Tensor, "1 dim"]:
        """Return the detector's query for a target."""
        return self.joint.joint.detector.queries([self.words[index]])

    @torch.no_grad()
    def detection(self, index: int) -> Detection:
        """Return the boxes of a target's row, with their logits for its word."""
        row = self.input.targets[index].row
        found: Detection = self.joint.joint.detector(self.input.features[row : row + 1].float(), self.query(index))
        return found

    @cached_property
    def rolled_out(self) -> list[Float[Tensor, "query key"]]:
        """Attention rollout of each row. Raises InputError where the family does not return attention."""
        network = self.input.model.network
        usual = network.config._attn_implementation
        # The fused implementations never materialise the attention matrix.
        network.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                outputs = self.input.run(self.input.features, output_attentions=True)
        finally:
            network.set_attn_implementation(usual)
        layers = getattr(outputs, "attentions", None)
        if not layers or any(layer is None for layer in layers):
            raise InputError(f"{self.input.model.name}: the family does not return attention; leave rollout out")
        return [rollout([layer[row] for layer in layers]).cpu() for row in range(len(self.input.batch.tokens))]

    @cached_property
    def neuron_maps(self) -> list[Map]:
        """The mean activation of each target's neurons over the patches."""
        given, targets = self.input, self.input.targets
        # A word may be none of the run's concepts, as with a single picture, where there is no run at all.
        missing = [target for target in targets if target.concept not in self.located]
        highest = iter(highest_neurons(given, missing) if missing else ())
        chosen = [self.located.get(target.concept) or next(highest) for target in targets]
        requests = [
            MapRequest(target.row, given.tokens[target.row], names[:NEURONS], signs[:NEURONS])
            for target, (names, signs) in zip(targets, chosen, strict=True)
        ]
        return patch_maps(given.model, given.batch, requests, lambda: given.run(given.features))


def highest_neurons(
    given: SaliencyInput, targets: Sequence[TokenPosition]
) -> list[tuple[list[tuple[int, int]], list[float]]]:
    """Return the neurons that contribute most to each target's token, with the signs of their activations."""
    with torch.inference_mode(), cache_activations(given.model, given.batch, targets) as captured:
        given.run(given.features)
    # By contribution whatever a run was scored by: a single picture has no run.
    scored = score_captured(given.model, captured, "contribution")
    scores = torch.cat([layer.cpu() for layer in scored.scores], dim=1)
    activations = torch.cat([layer.cpu() for layer in scored.activation], dim=1)
    neurons = [(layer, unit) for layer, width in enumerate(given.model.widths) for unit in range(width)]
    found = []
    for own, best in zip(activations, scores.topk(NEURONS, dim=1).indices.tolist(), strict=True):
        found.append(([neurons[index] for index in best], [1.0 if own[index] >= 0 else -1.0 for index in best]))
    return found


Method: TypeAlias = Callable[[Explained, int], Saliency]


def _aligned(outputs: Outputs) -> Method:
    """Return the method that weighs each box by its outputs' highest cosine with the gradient of the word.

    Of several outputs, cosines are scaled as published: logits and coordinates apart, each from 0 to 1 over all boxes.
    """

    def method(explained: Explained, index: int) -> Saliency:
        given, target = explained.joint, explained.input.targets[index]
        detector, features, skipped = given.joint.detector, given.features[target.row], given.joint.tower.skipped
        gradient = given.gradients[index]
        cosines, boxes = box_cosines(detector, features, explained.query(index), gradient, outputs, skipped)
        if outputs == "class":
            weights = cosines[:, 0]
        else:
            kinds = [cosines] if outputs == "boxes" else [cosines[:, :1], cosines[:, 1:]]
            # The best aligned output counts: a box may matter by its place or by its label.
            weights = torch.cat([min_max(kind) for kind in kinds], dim=1).max(dim=1).values
        return Saliency(paint(boxes, weights), weights, boxes)

    return method


def detector(explained: Explained, index: int) -> Saliency:
    """Weigh each box by the detector's confidence in the word; the language model has no part in it."""
    found = explained.detection(index)
    weights = found.logits[0, :, 0].sigmoid()
    return Saliency(paint(found.boxes[0], weights), weights, found.boxes[0])


def random(explained: Explained, index: int) -> Saliency:
    """Weigh the detector's boxes at random: the control of methods that weigh boxes."""
    boxes = explained.detection(index).boxes[0]
    weights = _random_weights(explained, index, len(boxes)).to(boxes)
    return Saliency(paint(boxes, weights), weights, boxes)


def random_patches(explained: Explained, index: int) -> Saliency:
    """Weigh each patch at random: the control where there is no detector."""
    grid = explained.input.grid(explained.input.targets[index].row)
    return Saliency(spread(_random_weights(explained, index, grid.rows * grid.columns), grid.rows))


def centre(explained: Explained, index: int) -> Saliency:
    """Weigh each patch by how near it is to the middle of the image: the control of photographs of one object."""
    grid = explained.input.grid(explained.input.targets[index].row)
    down, across = ((torch.arange(count) + 0.5) / count - 0.5 for count in (grid.rows, grid.columns))
    return Saliency(spread(-(down[:, None].square() + across[None].square()).sqrt().flatten(), grid.rows))


def _random_weights(explained: Explained, index: int, count: int) -> Float[Tensor, " weight"]:
    target = explained.input.targets[index]
    # Seeded by the target: the same weights at every call, whatever shares its batch.
    # Not hash(), which differs between processes.
    seed = zlib.crc32(f"{target.sample_id} {target.position} {target.concept}".encode())
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def gradient(explained: Explained, index: int) -> Saliency:
    """Weigh each patch by the norm of the gradient there."""
    grid = explained.input.grid(explained.input.targets[index].row)
    return Saliency(spread(explained.input.gradients[index].norm(dim=1), grid.rows))


def gradient_input(explained: Explained, index: int) -> Saliency:
    """Weigh each patch by gradient × input: to first order, what scaling the patch adds to the logit."""
    given, row = explained.input, explained.input.targets[index].row
    products = given.gradients[index] * given.patches(given.features, row).float()
    return Saliency(spread(products.sum(dim=1), given.grid(row).rows))


def attention_rollout(explained: Explained, index: int) -> Saliency:
    """Weigh each patch by the attention that reaches the target from its token, rolled out over the layers."""
    target = explained.input.targets[index]
    reached, tokens = explained.rolled_out[target.row][target.position], explained.input.tokens[target.row]
    return Saliency(spread(reached[torch.tensor(tokens.positions)], tokens.rows))


def neurons(explained: Explained, index: int) -> Saliency:
    """Weigh each patch by the mean activation of the word's ten highest neurons, each with its sign."""
    found = explained.neuron_maps[index]
    return Saliency(spread(found.flatten(), found.shape[0]))


METHODS: dict[str, Method] = {
    "alignment": _aligned("class"),
    "alignment-boxes": _aligned("boxes"),
    "alignment-any": _aligned("any"),
    "gradient": gradient,
    "gradient-input": gradient_input,
    "detector": detector,
    "rollout": attention_rollout,
    "neurons": neurons,
    "random": random,
    "random-patches": random_patches,
    "centre": centre,
}
"""Every method by its name."""

OF_BOXES = ("alignment", "alignment-boxes", "alignment-any", "detector", "random")
"""Methods that need a detector."""


def method_of(name: str) -> Method:
    """Return a method by its name. Raises InputError for an unknown one."""
    if name not in METHODS:
        raise InputError(f"unknown saliency method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def chosen_methods(names: str | None, *, detector: bool) -> tuple[str, ...]:
    """Return the methods of a comma-separated list; by default all, without a detector those that need none.

    Raises InputError for an unknown method, and for one that needs a detector where there is none.
    """
    if names is None:
        return tuple(name for name in METHODS if detector or name not in OF_BOXES)
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    if not chosen:
        raise InputError(f"--methods {names!r}: names none of {', '.join(METHODS)}")
    for name in chosen:
        method_of(name)
        if name in OF_BOXES and not detector:
            raise InputError(f"--methods {name}: it weighs a detector's boxes; give --detector")
    return chosen
