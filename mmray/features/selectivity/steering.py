"""Steering: set neurons so that the model, given one label's prompt, writes as for another label.

There are two choices of neurons. *chosen*: the source's neurons are zeroed, and the target's are set to their means
(Tang et al. 2024, §3.4). *switch*: the neurons whose activations separate source from target best are all set.

A neuron's mean over whole answers is of little use, because its activation depends on whether an article or a noun is
next. So the means are taken at each of an answer's first tokens; the last one stands for all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from mmray.features.selectivity.texts import image_batches
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import prompt_text
from mmray.models.windows import LEAST, windows
from mmray.neurons.split_on_oom import FAILURES, split_on_failure

BEGINNING = LEAST
"""Tokens of a text that a text-only model is given to continue."""


@dataclass(frozen=True)
class Steer:
    """Neurons, and the values they are set to at each token of an answer."""

    source: str
    target: str
    neurons: Int[ndarray, " neuron"]
    """Indices over all layers."""
    values: Float[ndarray, "step neuron"]
    """The last step stands for all tokens that follow."""
    everywhere: bool
    """Whether to set them at all positions, prompt and image included, or only from the answer's first token on."""


def steer_of(
    settings: SelectivitySettings, selection: LabelSelection, totals: dict[str, Totals], labels: Sequence[str]
) -> Steer:
    """Return the neurons and values to set; raises InputError if no neuron was chosen for the target.

    Of the source there may be none to switch off: LAPE finds few neurons of English.
    """
    assert settings.steered is not None
    source, target = (labels.index(label) for label in settings.steered)
    values = mean_of(totals, target)[None] if settings.steer_values == "mean" else means_by_token(totals, target)
    values = values * settings.steer_factor
    if settings.steer_neurons == "switch":
        contrast = d_prime(totals, source, target)
        neurons = contrast.topk(round(len(contrast) * settings.steer_share)).indices.sort().values
    else:
        off, on = selection.chosen.of(source), selection.chosen.of(target)
        if not len(on):
            raise InputError(
                f"--steer {settings.steer}: no neuron of {settings.steered[1]!r} was chosen; give a higher --rate, or "
                "--steer-neurons switch"
            )
        neurons = torch.unique(torch.cat([off, on]))
        # A neuron of both labels is set, not zeroed.
        values[:, off[~torch.isin(off, on)]] = 0.0
    return Steer(
        *settings.steered, neurons.numpy(), values[:, neurons].float().numpy(), settings.steer_positions == "all"
    )


def _steps(totals: dict[str, Totals]) -> list[Totals]:
    """Return the totals at each of a text's first tokens, in order."""
    return [totals[name] for name in sorted(totals) if name.startswith("course ")]


def means_by_token(totals: dict[str, Totals], label: int) -> Float64[Tensor, "step neuron"]:
    """Return a label's mean activation at each of the first tokens of its texts, up to the longest text."""
    return torch.stack([s.sums[0, :, label] / s.tokens[0, label] for s in _steps(totals) if s.tokens[0, label] > 0])


def mean_of(totals: dict[str, Totals], label: int) -> Float64[Tensor, " neuron"]:
    """Return a label's mean activation over all tokens of its texts."""
    steps = _steps(totals)
    total: Tensor = sum((step.sums[0, :, label] for step in steps), torch.zeros(()))
    return total / sum(float(step.tokens[0, label]) for step in steps)


def d_prime(totals: dict[str, Totals], source: int, target: int) -> Float64[Tensor, " neuron"]:
    """Return d' of each neuron: the difference of two labels' means, in standard deviations within the labels."""
    squares = totals["spread"]
    means = {label: mean_of(totals, label) for label in (source, target)}
    within = [squares.sums[0, :, label] / squares.tokens[0, label] - means[label] ** 2 for label in (source, target)]
    # Rounding can push a variance of zero slightly below it.
    deviation = (0.5 * (within[0] + within[1])).clamp(min=0).sqrt()
    # Bounded, so that a neuron that never moves does not win by a tiny difference of means.
    return (means[source] - means[target]).abs() / deviation.clamp(min=1e-4)


@contextmanager
def steered(model: LoadedModel, steer: Steer, rows: int) -> Iterator[None]:
    """Set the neurons during one call of `generate` with so many prompts within the with-block.

    Raises InputError for routed experts.
    """
    starts = np.cumsum([0, *model.widths])
    step = _Step(steer.everywhere, rows)
    with ExitStack() as stack:
        # The first MLP runs once per token written, so it counts them.
        decoder = model.network.get_submodule(model.projections[0].path)
        stack.callback(decoder.register_forward_pre_hook(step.advance).remove)
        for layer, projection in enumerate(model.projections):
            own = (steer.neurons >= starts[layer]) & (steer.neurons < starts[layer + 1])
            if not own.any():
                continue
            if projection.experts:
                raise InputError(f"{model.name}: --steer: the neurons of routed experts can't be set")
            # Hooks run on the layer's own device; values move there with its activations.
            units = torch.from_numpy(steer.neurons[own] - starts[layer])
            hook = step.setting(units, torch.from_numpy(steer.values[:, own]))
            module = model.network.get_submodule(projection.path)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


class _Step:
    """Counts the tokens of an answer while `generate` writes them."""

    def __init__(self, everywhere: bool, rows: int) -> None:
        self.everywhere = everywhere
        self.rows = rows
        self.number = -1

    def advance(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        """Move on to the next token."""
        self.number += 1

    def setting(
        self, units: Tensor, values: Float[Tensor, "step unit"]
    ) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """Return a hook that sets these units of a layer."""

        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            # Cloned, because a hook must not change its caller's tensor.
            activation = arguments[0].clone()
            # OPT's MLPs see the positions of all rows in one matrix.
            by_row = activation.view(self.rows, -1, activation.shape[-1])
            step_values = values[min(self.number, len(values) - 1)].to(activation)
            index = units.to(activation.device)
            if self.everywhere:
                by_row[..., index] = step_values
            else:
                # Prompts are padded on the left, so the last position writes the next token.
                by_row[:, -1, index] = step_values
            return (activation, *arguments[1:])

        return replace


def steered_captions(
    model: LoadedModel, samples: Sequence[Sample], steer: Steer, census: CensusSettings, size: int
) -> list[dict[str, str]]:
    """Return one row of `replies` per sample: the caption that the model writes, unchanged and steered.

    The question is the run's, or by default that of the sample's language. A text-only model continues the beginning of
    the sample's text. Raises ShardError for a sample that fails alone.
    """

    def before_and_after(batch: Sequence[Sample]) -> list[dict[str, str]]:
        prompts = [_prompt(model, sample, census) for sample in batch]
        images = [None if sample.image is None else decode_image(sample.image, sample.background) for sample in batch]
        before = generate(model, prompts, images)
        with steered(model, steer, len(prompts)):
            after = generate(model, prompts, images)
        texts = ([caption_of(model, tokens)[0] for tokens in replies] for replies in (before, after))
        return [
            {"sample_id": sample.sample_id, "before": unchanged, "after": changed}
            for sample, unchanged, changed in zip(batch, *texts, strict=True)
        ]

    batches = image_batches(model, samples, lambda sample: sample, size)
    done = (rows for batch in batches for rows in split_on_failure(batch, before_and_after, _refuse, FAILURES))
    return [row for rows in done for row in rows]


def _prompt(model: LoadedModel, sample: Sample, census: CensusSettings) -> str:
    """Return the question of a sample's caption; for a text-only model, followed by the beginning of its text."""
    prefix = census.prefix if model.parts.reads_images else windows(model, "", sample.caption, BEGINNING)[0]
    asked = sample.asked(census.prompt)
    return prompt_text(model, asked, sample.language, image=sample.image is not None, prefix=prefix)


def _refuse(sample: Sample, problem: str) -> None:
    raise ShardError(f"sample {sample.sample_id}: {problem}")
