"""Prove on a small example that a model's parts are what they are taken for; a wrong belief is silent otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.blocks import block_of
from mmray.models.capture import capture_activations, capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import NounSource
from mmray.neurons.scoring import score_batch
from mmray.neurons.token_positions import place_mentions
from mmray.neurons.validation_cache import is_validated, remember

CAPTIONS = ("An image of a dog and a cat.", "An image of a dog and a big red car.")
NOUNS = NounSource("lexicon", lexicon={None: frozenset({"dog", "cat", "car"})})
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 7e-3}
"""Relative error ‖found - expected‖ / ‖expected‖ allowed in what a module writes, by the network's number format.

Three times what rounding makes of it or more, and less than an output that is one per cent too large.
"""
LATER = 1e-2
"""Difference allowed in scores, relative to the highest: rows of one batch are computed alike, often to the bit."""


Claim: TypeAlias = Callable[[LoadedModel], tuple[bool, str]]
"""Returns whether it holds, and the figure that says so."""


@dataclass(frozen=True)
class Check:
    """One claim about a model, whether it holds, and the figure that says so."""

    name: str
    passed: bool
    detail: str


def check_parts(model: LoadedModel, claims: Mapping[str, Claim]) -> list[Check]:
    """Check the model's parts on two captions and return every claim; a claim that can't be tried has failed."""
    checks: list[Check] = []
    for name, test in claims.items():
        try:
            passed, detail = test(model)
        except Exception as error:  # noqa: BLE001  whatever breaks, the claim is not proven
            passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        checks.append(Check(name, passed, detail))
    return checks


def assert_sound(model: LoadedModel) -> None:
    """Raise InputError naming the first claim that fails.

    A checkpoint that was proven on this machine is not tried again, until a file of it or a version changes.
    """
    if is_validated(model):
        return
    for name, test in CHECKS.items():
        passed, detail = test(model)
        if not passed:
            raise InputError(f"{model.name}: {name} fails ({detail}); run mmray check-model {model.name}")
    remember(model)


def picture() -> PIL.Image.Image:
    """Return a small picture with some structure, the same each time."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    return PIL.Image.fromarray(noise)


def example(model: LoadedModel, captions: tuple[str, ...] = CAPTIONS[:1]) -> Batch:
    """Return the batch of these captions of the picture."""
    prompt = prompt_text(model, None, "en")
    pairs = [tokenize_caption(model, prompt, caption) for caption in captions]
    ids, offsets = [tokens for tokens, _ in pairs], [places for _, places in pairs]
    return encode(model, [prompt] * len(captions), [picture()] * len(captions), ids, offsets)


@torch.inference_mode()
def identity(model: LoadedModel) -> tuple[bool, str]:
    """Σ over neurons of activation · row of W_out = what the MLP writes, in every layer.

    Then contributions add up for every token: they are this sum's product with the token's unembedding. A single
    token's sum would tell less, for of ten thousand neurons mixed up the contributions cancel to a hundredth.
    """
    batch = example(model)
    row = batch.caption_start[0]
    activations: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[object, ...], output: Tensor) -> None:
        outputs.append(output.flatten(0, -2)[row].float())

    with ExitStack() as stack:
        stack.enter_context(
            capture_activations(
                model.network, model.projections, lambda _, seen, __: activations.append(seen[row].float())
            )
        )
        for projection in model.projections:
            module = model.network.get_submodule(projection.path)
            stack.callback(module.register_forward_hook(keep).remove)
        forward(model, batch)
    worst = 0.0
    for projection, activation, output in zip(model.projections, activations, outputs, strict=True):
        bias = getattr(model.network.get_submodule(projection.path), "bias", None)
        written = activation @ output_rows(model.network, projection).float()
        error = _error(written + bias.float() if isinstance(bias, Tensor) else written, output)
        # Experts' outputs are weighted and added up, which rounds them twice more.
        worst = max(worst, error / 2 if projection.experts else error)
    return worst <= TOLERANCE[_number_format(model)], f"largest relative error {worst:.1e} in {len(outputs)} layers"


@torch.inference_mode()
def logits_follow(model: LoadedModel) -> tuple[bool, str]:
    """What enters the final norm gives, by norm and unembedding as they were found, the network's own logits."""
    batch = example(model)
    states: list[Tensor] = []
    with capture_input(model.norm, states.append):
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits
    row = batch.caption_start[0]
    error = _error(vocabulary_logits(model, states[-1][0, row][None])[0], logits[0, row].float())
    return error <= TOLERANCE[_number_format(model)], f"relative error {error:.1e}"


@torch.inference_mode()
def hooks_neutral(model: LoadedModel) -> tuple[bool, str]:
    """Logits are bit-equal with hooks in place."""
    batch = example(model)
    inputs = batch.to(model.device, model.network.dtype)
    plain = model.network(**inputs).logits
    with capture_activations(model.network, model.projections, lambda *_: None):
        hooked = model.network(**inputs).logits
    return torch.equal(plain, hooked), "logits bit-equal" if torch.equal(plain, hooked) else "logits differ"


@torch.inference_mode()
def image_seen(model: LoadedModel) -> tuple[bool, str]:
    """The image has places in the sequence (or is looked at from outside it), and changes the logits.

    What enters the first block may change with it at these places alone: a placeholder taken for another has others.
    """
    batch = example(model)
    places = [position for run in batch.runs if run.modality == "image" for position in range(run.start, run.stop)]
    inputs = batch.to(model.device, model.network.dtype)
    darker = {name: value * 0.5 if name.startswith("pixel_values") else value for name, value in inputs.items()}
    entered: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        entered.append(next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor)))

    with ExitStack() as stack:
        stack.callback(block_of(model, 0).register_forward_pre_hook(enter, with_kwargs=True).remove)
        logits, other = (model.network(**given).logits[0, -1] for given in (inputs, darker))
    changed = not torch.equal(logits, other)
    expected = model.parts.image_in_sequence
    where = (
        f"{len(places)} image tokens in the sequence" if expected else f"by {model.parts.image}, outside the sequence"
    )
    if not changed:
        return False, f"{where}; but the image changes nothing"
    if not expected:
        return True, where
    moved = (entered[0] != entered[1]).any(dim=-1)[0].nonzero()[:, 0].tolist()
    strange = sorted({*moved} - {*places})
    return bool(places) and not strange, where + (f"; but it changes position {strange[0]} too" if strange else "")


@torch.inference_mode()
def later_words_hidden(model: LoadedModel) -> tuple[bool, str]:
    """A noun's score does not depend on the words behind it, as when the model writes the caption itself."""
    batch = example(model, CAPTIONS)
    places = [
        place
        for row, caption in enumerate(CAPTIONS)
        for place in place_mentions(batch, row, "", NOUNS.find(caption, "en", None)[:1])
    ]
    first, second = torch.cat([part.cpu() for part in score_batch(model, batch, places).scores], dim=1)
    difference = float((first - second).abs().max() / first.abs().max())
    return difference <= LATER, f"largest relative difference {difference:.1e}"


def _number_format(model: LoadedModel) -> torch.dtype:
    """Return the decoder's number format; a network keeps some of its parts in fp32 (the Q-Former, T5's W_out)."""
    return unembedding_rows(model.network, model.parts).dtype


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.to(expected.device) - expected).norm() / expected.norm().clamp(min=1e-12))


CHECKS: dict[str, Claim] = {
    "sum of contributions = MLP write · unembedding": identity,
    "logits = unembedding · final norm": logits_follow,
    "hooks leave the logits alone": hooks_neutral,
    "the image is seen": image_seen,
    "later words are hidden": later_words_hidden,
}
"""What is checked whenever a model is loaded, by the name that users see: a few forwards of a caption tell."""
