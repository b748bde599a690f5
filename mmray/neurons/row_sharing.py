"""Whether captions of one image may share a row of a model: shown on an example, because no configuration says it."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from PIL import ImageOps
from torch import Tensor

from mmray.errors import InputError
from mmray.models.capture import capture_activations
from mmray.models.loading import LoadedModel
from mmray.models.packing import encode_shared
from mmray.models.processing import noise_image
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.activation_cache import forward
from mmray.neurons.split_on_oom import FAILURES
from mmray.neurons.validation import CAPTIONS

EXAMPLE = (*CAPTIONS, "A dog.")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed relative error ‖shared - alone‖ / ‖alone‖ of a caption's activations in a layer, by the network's dtype."""


class RowSharing:
    """Whether captions of one image may share a row of a model."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    @cached_property
    def problem(self) -> str:
        """Return why not; empty if they may. The first call runs the example."""
        return _difference(self.model)


@torch.inference_mode()
def _difference(model: LoadedModel) -> str:
    """Return how captions of two images differ in shared rows from rows of their own; empty if they do not."""
    first, second = noise_image(), ImageOps.mirror(noise_image())
    # Rows of different lengths, so that one is padded.
    images, texts = [first] * 3 + [second] * 2, [*EXAMPLE, *EXAMPLE[1:]]
    # Prompts of two languages branch before the captions.
    prompts = [prompt_text(model, None, language) for language in ("en", "en", "fr", "en", "en")]
    captions = [tokenize_caption(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    tokens, offsets = [ids for ids, _ in captions], [covered for _, covered in captions]
    try:
        shared = encode_shared(model, prompts, images, tokens, offsets)
        if shared is None:
            return "the family's inputs can't be written for shared rows"
        found = _activations(model, shared)
    except (InputError, *FAILURES) as error:
        return f"a forward with shared rows fails ({' '.join(str(error).split())[:200]})"
    alone = _activations(model, encode(model, prompts, images, tokens, offsets))
    worst = max(
        float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in zip(found, alone, strict=True)
    )
    # A comparison with NaN is false.
    if worst <= TOLERANCE[model.network.dtype]:
        return ""
    return f"activations differ by {worst:.1e} from those of rows of their own"


def _activations(model: LoadedModel, batch: Batch) -> list[Float[Tensor, "position neuron"]]:
    """Return each layer's activations at the positions that predict caption tokens and at the images'."""
    index = torch.tensor(
        [
            batch.flat(row, position)
            for row, (start, caption) in enumerate(zip(batch.caption_start, batch.tokens, strict=True))
            for position in (*batch.image_positions(row), *range(start - 1, start + len(caption)))
        ]
    )
    found: list[Tensor] = []
    with capture_activations(
        model.network,
        model.projections,
        lambda _, activation, __: found.append(activation[index.to(activation.device)]),
    ):
        forward(model, batch)
    return [activation.float() for activation in found]
