"""The model's own captions: batched greedy generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from PIL.Image import Image

from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.prompting import pad_left, run_processor


@torch.inference_mode()
def generate(
    model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None], longest: int = LONGEST
) -> list[list[int]]:
    """Return the token ids that the model writes greedily after each prompt, without the end of sequence."""
    features = run_processor(model, prompts, images)
    if not model.parts.encoder_decoder:
        features = pad_left(features)
    dtype = model.network.dtype
    inputs = {
        name: value.to(model.device, dtype if value.is_floating_point() else value.dtype)
        for name, value in features.items()
    }
    network: Any = model.network
    written = network.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
    # Decoder-only networks repeat the prompt, unless they were given embeddings (BLIP-2) or are encoder-decoders.
    prompt = features["input_ids"]
    if not model.parts.encoder_decoder and torch.equal(written[:, : prompt.shape[1]].cpu(), prompt):
        written = written[:, prompt.shape[1] :]
    ends = end_tokens(model)
    # The start token stands first in what an encoder-decoder wrote.
    return [until_special(row, ends, begun=not model.parts.encoder_decoder) for row in written.tolist()]


def end_tokens(model: LoadedModel) -> set[int]:
    """Return the tokens that no caption holds: the tokenizer's special ones, and what generation stops at.

    That is a special one too, or not: BLIP-2's OPT ends with a line break.
    """
    stops: int | list[int] | None = model.network.generation_config.eos_token_id
    return {*model.tokenizer.all_special_ids, *([stops] if isinstance(stops, int) else stops or [])}


def token_text(model: LoadedModel, token: int) -> str:
    """Return a token as people read it: without the blank before it; a blank token shows its own spelling."""
    text = model.tokenizer.decode([token]).strip()
    return text or str(model.tokenizer.convert_ids_to_tokens(token))


def caption_of(model: LoadedModel, tokens: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of generated tokens, and the characters that each of them covers.

    Tokens are decoded with all that stands before them, for one may be part of a character or carry a blank. Blanks
    before punctuation are left as they are: taking them away moves characters from one token to the next.
    """

    def decode(count: int) -> str:
        return str(model.tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)).lstrip()

    text = decode(len(tokens))
    lengths = [len(decode(count)) for count in range(1, len(tokens) + 1)]
    # Half a character may be spelt as several unknown ones: what a token ends is what no longer text goes below.
    stops = list(accumulate(reversed(lengths), min))[::-1]
    return text, list(pairwise([0, *stops]))


def until_special(tokens: list[int], special: set[int], *, begun: bool = True) -> list[int]:
    """Return what stands before the first special token; not `begun`: of what follows those at the beginning."""
    start = 0 if begun else next((place for place, token in enumerate(tokens) if token not in special), len(tokens))
    stop = next((place for place, token in enumerate(tokens[start:], start) if token in special), len(tokens))
    return tokens[start:stop]
