"""Choose the next token by logits of several views of an image, while transformers' `generate` runs.

Views with an image are further rows of the batch, after those of the images themselves, and write the same tokens. The
prompt without its image has a key-value cache of its own. So any family that generates from images can have the former;
the latter needs a decoder whose prompt is part of its sequence.

Leng et al. 2023, *Mitigating Object Hallucinations through Visual Contrastive Decoding* (arXiv 2311.16922), equations 3
to 5; Liu et al. 2024 (arXiv 2407.21771), equation 6.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import PIL.ImageChops
import PIL.ImageOps
import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor

from mmray.errors import InputError
from mmray.models.decodings import MIRRORED, NO_IMAGE, NOISE_STEP, NOISED, PLAUSIBLE, SHIFTED, Decoding
from mmray.models.families import habits_of
from mmray.models.image_attention import ImageAttention
from mmray.models.loading import LoadedModel
from mmray.models.processing import IMAGE_MASK

PIXELS = "pixel_values"
SHIFT = 1 / 32
"""By what fraction of its width a shifted view is moved: less than a patch."""


def combined(
    image: Float[Tensor, "row token"], others: Sequence[tuple[float, Float[Tensor, "row token"]]]
) -> Float[Tensor, "row token"]:
    """Return l(image) + Σ w · (l(image) − l(view)), −∞ for tokens below PLAUSIBLE of the likeliest given the image.

    `image` and `others` are log-probabilities, the latter with their weights.
    """
    total = image.clone()
    for weight, other in others:
        total += weight * (image - other)
    # The difference of two −∞ is no number.
    cutoff = image.amax(dim=1, keepdim=True) + math.log(PLAUSIBLE)
    return total.masked_fill(image < cutoff, -torch.inf)


class CombinedLogits:
    """A logits processor of `generate`: scores of an image, combined with those of its views, for all its rows."""

    def __init__(self, decoding: Decoding, images: int, without: WithoutImage | None) -> None:
        self.images, self.without = images, without
        self.weights = [weight for view, weight in decoding.views if view != NO_IMAGE]
        self.no_image = sum(weight for view, weight in decoding.views if view == NO_IMAGE)

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "row token"]) -> Float[Tensor, "row token"]:
        """Return the combined scores, the same in all rows of an image."""
        image, *views = torch.split(scores.float().log_softmax(dim=-1), self.images)
        others = list(zip(self.weights, views, strict=True))
        if self.without is not None:
            last = self.without.log_probs(input_ids[: self.images, -1])
            others.append((self.no_image, last[:, : image.shape[1]].to(image.device)))
        return combined(image, others).repeat(1 + len(self.weights), 1)


class WithoutImage:
    """Continues prompts without their image, a token at a time, with a cache of its own."""

    def __init__(self, model: LoadedModel, prompts: Sequence[list[int]], pause: Callable[[], Any]) -> None:
        self.model, self.prompts, self.pause = model, prompts, pause
        # Prompts of one length share a batch without padding, which would shift positions.
        lengths = sorted({len(prompt) for prompt in prompts})
        self.groups = [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
        self.caches: list[Any] = [None] * len(self.groups)
        self.written = 0

    @torch.inference_mode()
    def log_probs(self, last: Int[Tensor, " row"]) -> Float[Tensor, "row token"]:
        """Return log-probabilities of the next token, given the last token written, which at first there is none."""
        found: list[Tensor] = [torch.empty(0)] * len(self.prompts)
        for number, rows in enumerate(self.groups):
            prompts = torch.tensor([self.prompts[row] for row in rows], device=last.device)
            # Once a cache holds the prompts, only the token written last is new.
            tokens = last[rows, None] if self.written else prompts
            seen = prompts.shape[1] + self.written
            logits, self.caches[number] = self._forward(tokens, seen, self.caches[number])
            for row, own in zip(rows, logits, strict=True):
                found[row] = own
        self.written += 1
        return torch.stack(found).float().log_softmax(dim=-1)

    def _forward(self, tokens: Int[Tensor, "row position"], seen: int, cache: Any) -> tuple[Tensor, Any]:
        network: Any = self.model.network
        known = inspect.signature(network.forward).parameters
        # transformers renames it.
        name = "cache" if "cache" in known else "past_key_values"
        more: dict[str, Any] = {name: cache}
        if "position_ids" in known:
            # Said, because Qwen2-VL would go on from the positions of its last image.
            first = seen - tokens.shape[1] + habits_of(network.config).first_position
            more["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = torch.ones(len(tokens), seen, dtype=torch.long, device=tokens.device)
        with self.pause():
            output = network(input_ids=tokens, attention_mask=mask, use_cache=True, **more)
        return output.logits[:, -1], getattr(output, name)


def image_columns(model: LoadedModel, features: dict[str, Tensor]) -> Bool[Tensor, "row column"]:
    """Return which positions of the prompts are the image's."""
    if IMAGE_MASK in features:
        return features[IMAGE_MASK].bool()
    token = model.parts.image_token_id
    ids = features["input_ids"]
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


def views_of(images: Sequence[Image], decoding: Decoding) -> list[Image]:
    """Return the further rows of a batch, view by view; noise is added to pixels once they are normalised."""
    return [_view(image, view) for view, _ in decoding.views if view != NO_IMAGE for image in images]


def _view(image: Image, view: str) -> Image:
    if view == MIRRORED:
        return PIL.ImageOps.mirror(image)
    if view.startswith(SHIFTED):
        step = max(1, round(image.width * SHIFT)) * (1 if view.endswith("+") else -1)
        moved = PIL.ImageChops.offset(image, step, 0)
        # What leaves at one side must not come in at the other: the old columns stay there.
        edge = (0, 0, step, image.height) if step > 0 else (image.width + step, 0, image.width, image.height)
        moved.paste(image.crop(edge), edge)
        return moved
    return image


def add_noise(
    model: LoadedModel, features: dict[str, Tensor], images: Sequence[Image], decoding: Decoding
) -> dict[str, Tensor]:
    """Return the features with diffusion noise on the pixels of noised views.

    Raises InputError for a family without a tensor of pixels.
    """
    kinds = ["", *(view for view, _ in decoding.views if view != NO_IMAGE)]
    if NOISED not in kinds:
        return features
    if PIXELS not in features:
        raise InputError(f"{model.name}: its processor gives no {PIXELS} that vcd could add noise to")
    pixels = features[PIXELS].clone()
    # Packed pixels are those of one image and its views, which are equally many.
    parts = pixels.chunk(len(kinds) * len(images))
    for place, part in enumerate(parts):
        kind, image = kinds[place // len(images)], images[place % len(images)]
        if kind == NOISED:
            part.copy_(noised(part, zlib.crc32(image.tobytes())))
    return features | {PIXELS: pixels}


def noised(pixels: Tensor, seed: int) -> Tensor:
    """Return pixels after NOISE_STEP steps of diffusion, with the schedule of VCD's code."""
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(dim=0)[NOISE_STEP]
    # Seeded by the image, so that neither its batch nor its shard matters.
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise.to(pixels)


@contextmanager
def decoding_hooks(
    model: LoadedModel, decoding: Decoding, features: dict[str, Tensor], images: int
) -> Iterator[list[CombinedLogits]]:
    """Yield what `generate` needs for a decoding, given left-padded features, while attention is amplified.

    `images` is the number of rows without those of views. Raises InputError for what the family can't have.
    """
    attention: ImageAttention | None = None
    columns = image_columns(model, features)
    if decoding.attention:
        if not model.parts.image_in_sequence or model.parts.image_before:
            raise InputError(f"{model.name}: the image has no tokens of the prompt whose attention could be amplified")
        attention = ImageAttention(model, columns, decoding.attention)
    without = None
    if any(view == NO_IMAGE and weight for view, weight in decoding.views):
        network: Any = model.network
        pixels = inspect.signature(network.forward).parameters.get(PIXELS)
        if model.parts.encoder_decoder or pixels is None or pixels.default is inspect.Parameter.empty:
            raise InputError(f"{model.name}: does not run without an image, which {decoding.name} contrasts it with")
        kept = features["attention_mask"].bool() & ~columns
        prompts = [row[own].tolist() for row, own in zip(features["input_ids"], kept, strict=True)]
        without = WithoutImage(model, prompts[:images], lambda: _paused(attention))
    with ExitStack() as stack:
        if attention is not None:
            stack.enter_context(attention.applied())
        yield [CombinedLogits(decoding, images, without)]


@contextmanager
def _paused(attention: ImageAttention | None) -> Iterator[None]:
    if attention is not None:
        attention.paused = True
    try:
        yield
    finally:
        if attention is not None:
            attention.paused = False
