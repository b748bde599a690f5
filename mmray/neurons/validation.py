"""Validate a model's parts on a small example: wrong parts would give wrong results without any error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.blocks import block_of, block_output
from mmray.models.capture import capture_activations, capture_input
from mmray.models.experts import Experts
from mmray.models.linear import has_quantised, is_quantised
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.processing import noise_image
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.models.streams import by_token
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import NounSource
from mmray.neurons.scoring import score_batch
from mmray.neurons.token_positions import positions_of
from mmray.neurons.validation_cache import is_validated, remember

CAPTIONS = ("An image of a dog and a cat.", "An image of a dog and a big red car.")
NOUNS = NounSource("lexicon", lexicon={None: frozenset({"dog", "cat", "car"})})
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 7e-3}
"""Allowed relative error ‖found - expected‖ / ‖expected‖ of a module's output, by the network's dtype.

At least three times the rounding error, and below the error of an output that is one per cent too large.
"""
ROUNDED = 5e-2
"""The same for a quantised layer: some kernels round activations to eight bits (LLM.int8(), fp8)."""
LATER = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Allowed difference of scores, relative to the highest, by the network's dtype. Most are equal to the bit."""

IMAGE_SEEN = "the image is seen"
STREAMS_MIXED = "writes reach the final norm by the streams"

Claim: TypeAlias = Callable[[LoadedModel], tuple[bool, str]]
"""Returns whether it holds, and the measured figure."""


@dataclass(frozen=True)
class Check:
    """The result of one claim about a model: whether it holds, and the measured figure."""

    name: str
    passed: bool
    detail: str


def check_parts(model: LoadedModel, claims: Mapping[str, Claim]) -> list[Check]:
    """Return the result of every claim; one that raises has failed."""
    checks: list[Check] = []
    for name, claim in claims.items():
        try:
            passed, detail = claim(model)
        except Exception as error:  # noqa: BLE001  whatever breaks, the claim does not hold
            passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        checks.append(Check(name, passed, detail))
    return checks


def assert_sound(model: LoadedModel) -> None:
    """Raise InputError that names the first failing claim.

    A checkpoint validated on this machine is not checked again until one of its files or a version changes.
    """
    # Otherwise every worker of every job would pay for these forwards when it starts.
    if is_validated(model):
        return
    for name, claim in claims_of(model).items():
        passed, detail = claim(model)
        if not passed:
            raise InputError(f"{model.name}: {name} fails ({detail}); run mmray check-model {model.name}")
    remember(model)


def claims_of(model: LoadedModel) -> dict[str, Claim]:
    """Return the claims about a model: CHECKS, without that about images for a text-only one, and one about streams."""
    claims = {name: claim for name, claim in CHECKS.items() if model.parts.reads_images or name != IMAGE_SEEN}
    return claims if model.streams is None else claims | {STREAMS_MIXED: streams_mixed}


def example(model: LoadedModel, captions: tuple[str, ...] = CAPTIONS[:1], *, brightness: float = 1.0) -> Batch:
    """Return the batch of these captions of one image; for a text-only model, of these texts."""
    prompt = prompt_text(model, None, "en")
    tokens, offsets = zip(*(tokenize_caption(model, prompt, caption) for caption in captions), strict=True)
    image = noise_image(brightness) if model.parts.reads_images else None
    return encode(model, [prompt] * len(captions), [image] * len(captions), tokens, offsets)


@torch.inference_mode()
def identity(model: LoadedModel) -> tuple[bool, str]:
    """Σ over neurons of activation · row of W_out, plus biases = the MLP's output, in every layer.

    Contributions to any token then add up too: they are this sum times the token's unembedding.
    """
    # Not checked on one token's contributions: those of ten thousand neurons cancel to a hundredth, even if mixed up.
    batch = example(model)
    row = batch.caption_start[0]
    activations: list[Tensor] = []
    outputs: list[Tensor] = []
    biases: dict[int, Tensor | float] = {}

    def keep(_: nn.Module, __: tuple[object, ...], output: object) -> None:
        # Copied: Falcon adds attention to it in place.
        outputs.append(block_output(output).flatten(0, -2)[row].float().clone())

    with ExitStack() as stack:
        stack.enter_context(
            capture_activations(
                model.network, model.projections, lambda _, found, __: activations.append(found[row].float())
            )
        )
        for layer, projection in enumerate(model.projections):
            module = model.network.get_submodule(projection.path)
            if projection.experts:
                receive = partial(_at_row, biases, layer, row)
                stack.enter_context(Experts.of(model.network, projection).captured_biases(receive))
            else:
                bias = getattr(module, "bias", None)
                biases[layer] = 0.0 if bias is None else bias.float()
            stack.enter_context(module.register_forward_hook(keep))
        forward(model, batch)
    worst, passed, tolerance = 0.0, True, TOLERANCE[_dtype(model)]
    for layer, (projection, activation, output) in enumerate(zip(model.projections, activations, outputs, strict=True)):
        written = activation @ output_rows(model.network, projection).float()
        error = _error(written + biases[layer], output)
        worst = max(worst, error)
        # Experts' outputs are weighted and summed, which rounds them twice more.
        allowed = 2 * tolerance if projection.experts else tolerance
        rounded = not projection.experts and is_quantised(model.network.get_submodule(projection.path))
        passed = passed and error <= (max(allowed, ROUNDED) if rounded else allowed)
    return passed, f"largest relative error {worst:.1e} in {len(outputs)} layers"


def _at_row(kept: dict[int, Tensor | float], layer: int, row: int, bias: Tensor | float) -> None:
    """Keep what biases write for one token; one bias may be that of all tokens."""
    if isinstance(bias, Tensor):
        bias = bias[row if bias.dim() > 1 else ...].float()
    kept[layer] = bias


@torch.inference_mode()
def logits_follow(model: LoadedModel) -> tuple[bool, str]:
    """The final norm's input, through the norm and unembedding found, gives the network's own logits."""
    batch = example(model)
    states: list[Tensor] = []
    with capture_input(model.norm, states.append):
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits
    row = batch.caption_start[0]
    error = _error(vocabulary_logits(model, states[-1][0, row][None])[0], logits[0, row].float())
    return error <= TOLERANCE[_dtype(model)], f"relative error {error:.1e}"


@torch.inference_mode()
def streams_mixed(model: LoadedModel) -> tuple[bool, str]:
    """What embeddings, attention and MLPs write adds up to the final norm's input, with the streams' weights found."""
    assert model.streams is not None
    batch = example(model)
    row = torch.tensor([batch.caption_start[0]])
    final: list[Tensor] = []
    mlps: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, __: tuple[object, ...], output: Tensor) -> None:
        mlps[layer] = output.flatten(0, -2)[row.to(output.device)].float()

    with ExitStack() as stack:
        mix = stack.enter_context(model.streams.recorded(row))
        writes = stack.enter_context(model.streams.writes(row))
        stack.enter_context(capture_input(model.norm, final.append))
        for layer, projection in enumerate(model.projections):
            after = model.network.get_submodule(projection.post_norm or projection.path)
            stack.enter_context(after.register_forward_hook(partial(keep, layer)))
        forward(model, batch)
    hidden = final[0].flatten(0, -2)[row.to(final[0].device)].float()
    # In so many random directions, no part of a write is missed.
    directions = torch.randn(64, hidden.shape[1], generator=torch.Generator().manual_seed(0)).to(hidden)
    worst = _error(writes.shares(mix, directions), (directions @ hidden.T)[:, 0])
    for layer, written in mlps.items():
        # Relative to the stream, whose rounding is larger than that of what is added to it.
        without = writes.activated[layer] - written
        worst = max(worst, _error(without + writes.of_mlp(mix, layer), writes.activated[layer]))
    # A stream is rounded in every layer.
    allowed = 3 * TOLERANCE[_dtype(model)] * len(mlps) ** 0.5
    allowed = max(allowed, ROUNDED) if has_quantised(model.network) else allowed
    return worst <= allowed, f"relative error {worst:.1e} in {len(mlps)} layers"


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
    """The image has positions in the sequence (or is attended to from outside), and changes the logits.

    In the first block's input, the image may change only its own positions: this detects a wrong placeholder.
    """
    batch = example(model)
    positions = batch.image_positions(0)
    inputs = batch.to(model.device, model.network.dtype)
    # Any image would do that differs everywhere and has the same size.
    darker = example(model, brightness=0.5).to(model.device, model.network.dtype)
    first_inputs: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        states = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        first_inputs.append(by_token(states))

    with ExitStack() as stack:
        stack.enter_context(block_of(model, 0).register_forward_pre_hook(enter, with_kwargs=True))
        logits, other = (model.network(**variant).logits[0, -1] for variant in (inputs, darker))
    in_sequence = model.parts.image_in_sequence
    where = f"{len(positions)} image tokens in the sequence"
    where = where if in_sequence else f"by {model.parts.image}, outside the sequence"
    if torch.equal(logits, other):
        return False, f"{where}; but the image changes nothing"
    if not in_sequence:
        return True, where
    changed = (first_inputs[0] != first_inputs[1]).any(dim=-1)[0].nonzero()[:, 0].tolist()
    others = sorted({*changed} - {*positions})
    return bool(positions) and not others, where + (f"; but it changes position {others[0]} too" if others else "")


@torch.inference_mode()
def later_words_hidden(model: LoadedModel) -> tuple[bool, str]:
    """A noun's score does not depend on later words, as when the model generates the caption, nor on its row."""
    batch = example(model, CAPTIONS)
    positions = positions_of(batch, [("", NOUNS.find(caption, "en", None)[:1]) for caption in CAPTIONS])
    first, second = torch.cat([part.cpu() for part in score_batch(model, batch, positions).scores], dim=1)
    difference = float((first - second).abs().max() / first.abs().max())
    allowed = LATER[torch.bfloat16 if has_quantised(model.network) else _dtype(model)]
    return difference <= allowed, f"largest relative difference {difference:.1e}"


def _dtype(model: LoadedModel) -> torch.dtype:
    """Return the decoder's dtype; some networks keep other parts in fp32 (the Q-Former, T5's W_out)."""
    return unembedding_rows(model.network, model.parts).dtype


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.to(expected.device) - expected).norm() / expected.norm().clamp(min=1e-12))


CHECKS: dict[str, Claim] = {
    "sum of contributions = MLP write · unembedding": identity,
    "logits = unembedding · final norm": logits_follow,
    "hooks leave the logits alone": hooks_neutral,
    IMAGE_SEEN: image_seen,
    "later words are hidden": later_words_hidden,
}
"""Checked whenever a model is loaded, by the name that users see; costs a few forwards of one caption."""
