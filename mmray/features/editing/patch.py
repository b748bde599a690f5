"""Rewrite idle neurons to detect where the model is about to say a word, and to write another one there.

A change of W_out alone adds something wherever the neurons are active, and long replies change at near ties. A neuron
that is off everywhere else adds nothing there (Transformer-Patcher, Huang et al. 2023). So, per token to write:

    direction    k = (C + λI)⁻¹ (mean of x where the token should be − mean of x at kept answers), scaled so that
                 k·x is 0 on average at kept answers and 1 on average at these positions: linear discriminant analysis
    reads        f(SHARPNESS · (k·x − θ)), times a constant if the MLP is gated; θ is a share of what nearly all of
                 these positions reach
    writes       a row of W_out, learned as for other edits

x is what the neurons of the last layer read. Its mean is in it at every token, so a constant is a direction too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.errors import InputError
from mmray.features.editing.baselines import whole_layers
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import resume_all
from mmray.features.editing.task import Task
from mmray.features.editing.whitening import OUTPUT_RIDGE, whitening
from mmray.models.loading import LoadedModel
from mmray.models.mlp_inputs import MlpInputs
from mmray.models.parts import output_rows

SHARPNESS = 40.0
"""The non-linearity goes from closed to open within about 1/SHARPNESS, where 1 is the mean of the word's positions."""
RIDGE, MEAN_RIDGE = 0.05, 1e-3
"""λ, in units of the mean variance of x; and the same for the direction of the constant."""
REACHED = 0.1
"""Quantile of k·x at the word's positions that θ is a share of: a single odd image should not lower it."""
FLOOR = 1e-4
"""Mean square of an open neuron's activation at kept answers, at least: its row of W_out costs so much."""
QUIET = 1e-3
"""Added to a neuron's mean square, in units of the mean of all: one that is quiet here may be needed elsewhere. So the
neurons of an earlier patch, which write a lot when they open, are not taken for idle."""
CLOSE = 0.02
"""Largest relative error of the activations that `MlpInputs` gives for the neurons as they are."""


@dataclass(frozen=True)
class Detectors:
    """Where the tokens of an edit should be written, and which neurons can do it."""

    directions: Float[Tensor, "unit hidden"]
    """k, one per token."""
    reached: Float[Tensor, " unit"]
    constant: Float[Tensor, " hidden"]
    """A direction in which x is about 1 at every token."""
    units: Int[Tensor, " unit"]
    """The neurons to rewrite."""

    @classmethod
    def of(cls, task: Task) -> Detectors:
        """Return the detectors of a task; raises InputError where the last layer's neurons can't be rewritten."""
        model, layer = task.model, len(task.model.widths) - 1
        everything = Deltas(model, whole_layers(model, [layer]))
        read, squares = [], torch.zeros(model.widths[layer])
        for kind, examples in task.kept.learned.items():
            for part, _ in resume_all(model, examples, everything):
                if part.entered is None:
                    raise InputError(f"{model.name}: --method patch needs an MLP with dense weights and no experts")
                read.append(part.entered.float())
                squares = squares.to(part.activation) + task.settings.weights[kind] * part.activation.square().mean(0)
        if not read:
            raise InputError("--method patch needs answers that must stay; raise --kept, or analyse more samples")
        # All kinds alike: the neurons should be off whatever is said.
        kept = torch.cat(read)
        mean = kept.mean(0)
        moment = kept.T @ kept / len(kept)
        identity = moment.diagonal().mean() * torch.eye(len(mean), device=mean.device)
        constant = torch.linalg.solve(moment + MEAN_RIDGE * identity, mean)
        spread = moment - torch.outer(mean, mean) + RIDGE * identity
        directions, reached = [], []
        for here in _positions(model, task.new, everything):
            direction = torch.linalg.solve(spread, here.mean(0) - mean)
            # The constant takes the place of a bias, which many MLPs lack.
            direction = direction - (mean @ direction) * constant
            direction = direction / (here @ direction).mean()
            directions.append(direction)
            reached.append((here @ direction).quantile(REACHED))
        rows = output_rows(model.network, model.projections[layer]).detach().float()
        # What it costs kept answers if a neuron falls silent.
        squares = squares.to(rows.device) + QUIET * squares.mean()
        costs = squares * ((rows @ task.curvature.fisher.to(rows)) * rows).sum(1)
        units = costs.topk(len(directions), largest=False).indices
        return cls(torch.stack(directions), torch.stack(reached), constant, units)


@torch.no_grad()
def _positions(model: LoadedModel, new: list[Example], everything: Deltas) -> list[Float[Tensor, "position hidden"]]:
    """Return what the neurons read where new words are to be written and the model would write something else.

    One tensor per token to write. Raises InputError if the last layer's neurons can't be rewritten.
    """
    inputs = MlpInputs.of(model.network, model.projections[everything.first])
    found: dict[int, list[Tensor]] = defaultdict(list)
    for part, examples in resume_all(model, new, everything):
        if inputs is None or part.entered is None or not _is_known(inputs, part.entered, part.activation):
            raise InputError(f"{model.name}: --method patch can't rewrite what its neurons read; use --method learned")
        said = part.logits().argmax(1)
        start = 0
        for example in examples:
            first = example.rejected[0] if example.rejected else 0
            last = max(first + 1, example.no_repeat_from or 0) if example.rejected else 0
            # The new words alone: what follows them is as likely before the edit as after it.
            for position in range(start + first, start + last):
                if said[position] != part.targets[position]:
                    found[int(part.targets[position])].append(part.entered[position].float())
            start += len(example.tokens)
    if not found:
        raise InputError("--method patch: the model says the new words already; choose another --target")
    return [torch.stack(rows) for rows in found.values()]


def _is_known(
    inputs: MlpInputs, entered: Float[Tensor, "position hidden"], activation: Float[Tensor, "position unit"]
) -> bool:
    """Return whether `inputs` gives the activations that the network has."""
    # One position is enough: a norm or another function in between would show at each.
    units = torch.arange(activation.shape[1], device=activation.device)
    ours = inputs.activation(entered[:1], inputs.rows(units), inputs.biases(units))
    return float((ours - activation[:1]).norm()) <= CLOSE * float(activation[:1].norm())


class Patch(Deltas):
    """Neurons of the last layer that detect instead of what they did, and the rows of W_out that they then write."""

    def __init__(self, task: Task, detectors: Detectors, share: float) -> None:
        """Rewrite the neurons: they open at `share` of what nearly all positions reach."""
        model, layer = task.model, len(task.model.widths) - 1
        inputs = MlpInputs.of(model.network, model.projections[layer])
        assert inputs is not None, "there are detectors, so the neurons can be rewritten"
        self.reader, units = inputs, detectors.units
        self.biases, self.before = inputs.biases(units), inputs.rows(units).float()
        threshold = (share * detectors.reached)[:, None]
        constant = detectors.constant.expand_as(detectors.directions)
        scale = SHARPNESS * (1 - threshold)
        gate = SHARPNESS * (detectors.directions - threshold * constant)
        rows = torch.stack([gate, *[constant / scale] * (self.before.shape[1] - 1)], dim=1)
        # A neuron keeps its biases.
        rows = rows - self.biases[:, :, None] * detectors.constant
        # As rounded to the weights' number format.
        self.rows_read = rows.to(model.network.dtype).float()
        self.written = torch.zeros(0)
        super().__init__(model, [(layer, unit) for unit in units.tolist()])
        self.whitened = True
        opened = inputs.function(scale[:, 0]) / (scale[:, 0] if self.before.shape[1] > 1 else 1)
        right = whitening(task.curvature.fisher, OUTPUT_RIDGE).to(units.device)
        self.shapes[layer] = torch.diag(1 / (opened * FLOOR**0.5)), right

    def initial(self, rows: Float[Tensor, "unit hidden"]) -> list[Tensor]:
        """Return new rows of W_out, zero to begin with."""
        self.written = rows.float()
        return super().initial(rows)

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return what is added to the rows of W_out: the new ones without the old."""
        return super().rows(layer) - self.written

    @property
    def inputs(self) -> Float[Tensor, "unit part hidden"]:
        """What is added to the rows that the neurons read."""
        return self.rows_read - self.before

    def shaped(
        self, layer: int, activation: Float[Tensor, "... unit"], entered: Float[Tensor, "... hidden"] | None
    ) -> Float[Tensor, "... twice"]:
        """Return the activations that the neurons will have, times the left shape, and those that they had."""
        assert entered is not None, "there are detectors, so what the neurons read is known"
        opened = self.reader.activation(entered, self.rows_read, self.biases)
        return torch.cat([opened @ self.shapes[layer][0], activation.float()], dim=-1)

    def output(
        self,
        layer: int,
        activation: Float[Tensor, "... unit"],
        entered: Float[Tensor, "... hidden"] | None = None,
        *,
        shaped: bool = False,
    ) -> Float[Tensor, "... hidden"]:
        """Return what the edit adds to the MLP output: what the neurons write now, without what they wrote before."""
        if not shaped:
            activation = self.shaped(layer, activation, entered)
        opened, before = activation.chunk(2, dim=-1)
        return opened @ self.parameters[layer][0] @ self.shapes[layer][1] - before @ self.written
