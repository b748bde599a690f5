"""Steering: with one label's prompt, set neurons so that the model writes as for another label.

Two choices of neurons. *chosen*: the source's own are zeroed and the target's set to their means, as published (Tang et
al. 2024, §3.4). *switch*: the neurons whose activations tell source from target best, whatever they write, all set.

A neuron's mean over whole answers is of little use: what it does depends on whether an article or a noun is next. So
the means are those at each of an answer's first tokens (`COURSE`), the last of them standing for all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor, nn

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.errors import InputError, ShardError
from mmray.features.census.settings import CensusSettings
from mmray.features.selectivity.selection import LabelSelection, Totals
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.neurons.split_on_oom import FAILURES, split_on_failure

COURSE = "course"


@dataclass(frozen=True)
class Steer:
    """Neurons, numbered over all layers, and what they are set to at each token of an answer."""

    source: str
    target: str
    neurons: Int[ndarray, " neuron"]
    values: Float[ndarray, "course neuron"]
    everywhere: bool
    """At all positions, the prompt's and the image's too, and not only from the first token of the answer on."""


def steer_of(
    settings: SelectivitySettings, selection: LabelSelection, totals: dict[str, Totals], labels: Sequence[str]
) -> Steer:
    """Return what to set; raises InputError where no neuron of one of the two labels was chosen to be set."""
    assert settings.steered is not None
    source, target = (labels.index(label) for label in settings.steered)
    course = course_means(totals, target)
    if settings.steer_values == "mean":
        course = mean_of(totals, target)[None]
    course = course * settings.steer_factor
    if settings.steer_neurons == "switch":
        contrast = telling_apart(totals, source, target)
        neurons = contrast.topk(round(len(contrast) * settings.steer_share)).indices.sort().values
    else:
        off, on = selection.chosen.of(source), selection.chosen.of(target)
        for label, own in zip(settings.steered, (off, on), strict=True):
            if not len(own):
                raise InputError(
                    f"--steer {settings.steer}: no neuron of {label!r} was chosen; give a higher --rate, or "
                    "--steer-neurons switch"
                )
        neurons = torch.unique(torch.cat([off, on]))
        course[:, off[~torch.isin(off, on)]] = 0.0
    return Steer(
        *settings.steered, neurons.numpy(), course[:, neurons].float().numpy(), settings.steer_positions == "all"
    )


def course_means(totals: dict[str, Totals], label: int) -> Float64[Tensor, "course neuron"]:
    """Return a label's mean activation at each of the first tokens of its texts, as far as they go."""
    steps = [totals[name] for name in sorted(totals) if name.startswith(COURSE)]
    return torch.stack([s.sums[0, :, label] / s.tokens[0, label] for s in steps if s.tokens[0, label] > 0])


def mean_of(totals: dict[str, Totals], label: int) -> Float64[Tensor, " neuron"]:
    """Return a label's mean activation over all tokens of its texts."""
    steps = [totals[name] for name in sorted(totals) if name.startswith(COURSE)]
    total: Tensor = sum((step.sums[0, :, label] for step in steps), torch.zeros(()))
    return total / sum(float(step.tokens[0, label]) for step in steps)


def telling_apart(totals: dict[str, Totals], source: int, target: int) -> Float64[Tensor, " neuron"]:
    """Return how far apart the means of two labels are, in standard deviations within them (d')."""
    squares = totals["spread"]
    means = {label: mean_of(totals, label) for label in (source, target)}
    within = [squares.sums[0, :, label] / squares.tokens[0, label] - means[label] ** 2 for label in (source, target)]
    deviation = (0.5 * (within[0] + within[1])).clamp(min=0).sqrt()
    # A neuron that never moves tells nothing, however little its means are apart.
    return (means[source] - means[target]).abs() / deviation.clamp(min=1e-4)


@contextmanager
def steered(model: LoadedModel, steer: Steer) -> Iterator[None]:
    """Set the neurons while the block generates from one prompt's batch; holds for one call of `generate`.

    Raises InputError for networks whose MLPs don't see the positions of a row apart (OPT, routed experts).
    """
    starts = np.cumsum([0, *model.widths])
    step = _Step(steer.everywhere)
    with ExitStack() as stack:
        decoder = model.network.get_submodule(model.projections[0].path)
        stack.callback(decoder.register_forward_pre_hook(step.advance).remove)
        for layer, projection in enumerate(model.projections):
            own = (steer.neurons >= starts[layer]) & (steer.neurons < starts[layer + 1])
            if not own.any():
                continue
            if projection.experts:
                raise InputError(f"{model.name}: --steer: the neurons of routed experts can't be set")
            units = torch.from_numpy(steer.neurons[own] - starts[layer])
            hook = step.setting(units, torch.from_numpy(steer.values[:, own]))
            module = model.network.get_submodule(projection.path)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


class _Step:
    """Counts the tokens of an answer as `generate` writes them."""

    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere
        self.number = -1

    def advance(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        """Note that the next token is being written."""
        self.number += 1

    def setting(
        self, units: Tensor, values: Float[Tensor, "course unit"]
    ) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """Return the hook that sets these units of a layer."""

        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            activation = arguments[0].clone()
            if activation.dim() != 3:
                raise InputError(
                    "--steer: this family's MLPs see all rows in one; its neurons can't be set by position"
                )
            wanted = values[min(self.number, len(values) - 1)].to(activation)
            index = units.to(activation.device)
            if self.everywhere:
                activation[..., index] = wanted
            else:
                # Prompts are padded on the left: the last position writes the next token.
                activation[:, -1, index] = wanted
            return (activation, *arguments[1:])

        return replace


def written(
    model: LoadedModel, samples: Sequence[Sample], steer: Steer, census: CensusSettings, size: int
) -> list[dict[str, str]]:
    """Return a row of `replies` a sample: its caption as the model writes it, and steered.

    The question is the run's own where it has one, else that of the sample's language. Raises ShardError for a sample
    that can't be done alone.
    """

    def both(some: Sequence[Sample]) -> list[dict[str, str]]:
        prompts = [
            prompt_text(model, census.prompt, sample.language, image=sample.image is not None, prefix=census.prefix)
            for sample in some
        ]
        images = [None if sample.image is None else decode_image(sample.image, sample.background) for sample in some]
        before = generate(model, prompts, images)
        with steered(model, steer):
            after = generate(model, prompts, images)
        texts = ([caption_of(model, tokens)[0] for tokens in replies] for replies in (before, after))
        return [
            {"sample_id": sample.sample_id, "before": plain, "after": changed}
            for sample, plain, changed in zip(some, *texts, strict=True)
        ]

    parts = (
        part
        for some in _cut(samples, size)
        for part in within_budget(some, lambda sample: pixels_of(model, sample.image), BUDGET)
    )
    return [row for part in parts for rows in split_on_failure(part, both, _refuse, FAILURES) for row in rows]


def _refuse(sample: Sample, problem: str) -> None:
    raise ShardError(f"sample {sample.sample_id}: {problem}")


def _cut(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield batches; samples with an image and without one can't share any."""
    ordered = sorted(samples, key=lambda sample: sample.image is None)
    for _, group in groupby(ordered, key=lambda sample: sample.image is None):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
