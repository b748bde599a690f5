"""The model's own captions: batched generation of the likeliest tokens, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import Any

import torch
from PIL.Image import Image
from torch.nn import functional
from transformers import LogitsProcessorList

from mmray.models.bans import RowBans
from mmray.models.combined_logits import PIXELS, add_noise, decoding_hooks, views_of
from mmray.models.decodings import GREEDY, NOISED, Decoding
from mmray.models.families import habits_of
from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.packed_linear import packed_linears
from mmray.models.processing import noise_image
from mmray.models.prompting import pad_left, prompt_text, run_processor

PACKED_ROWS = 16
"""Prompts of a batch that is worth packing weights for, which takes as long as a step or two."""


def generate(
    model: LoadedModel,
    prompts: Sequence[str],
    images: Sequence[Image | None],
    longest: int = LONGEST,
    decoding: Decoding = GREEDY,
    banned: Sequence[Sequence[list[int]]] = (),
) -> list[list[int]]:
    """Return the token ids that the model writes after each prompt, without the end token: see `generate_to_end`."""
    return [tokens for tokens, _ in generate_to_end(model, prompts, images, longest, decoding, banned)]


@torch.inference_mode()
def generate_to_end(
    model: LoadedModel,
    prompts: Sequence[str],
    images: Sequence[Image | None],
    longest: int = LONGEST,
    decoding: Decoding = GREEDY,
    banned: Sequence[Sequence[list[int]]] = (),
) -> list[tuple[list[int], int | None]]:
    """Return the token ids that the model writes after each prompt, and the token that ends them; None if cut off.

    Each is the likeliest, by the model alone or by a `decoding`; prompts without an image are always continued by the
    model alone. `banned` has per prompt the token sequences that it may not be continued with. Raises InputError for a
    decoding that the family can't have.
    """
    seen = [image for image in images if image is not None]
    plain = decoding.plain or not seen
    views = [] if plain else views_of(seen, decoding)
    # After the images themselves, view by view.
    rows = [*images, *views]
    features = run_processor(model, [*prompts] * (len(rows) // len(images)), rows)
    rewrites = habits_of(model.network.config).rewrites_prompt
    # The positions of a prompt that is rewritten would count the padding; packed pixels don't say whose they are.
    alone = rewrites and not features["attention_mask"].all()
    alone |= not plain and NOISED in dict(decoding.views) and len(features.get(PIXELS, ())) != len(rows)
    if alone and len(images) > 1:
        own = [[row] for row in banned] or [[]] * len(images)
        triples = zip(prompts, images, own, strict=True)
        return [generate_to_end(model, [one], [image], longest, decoding, some)[0] for one, image, some in triples]
    if not plain:
        features = add_noise(model, features, seen, decoding)
    if not model.parts.encoder_decoder:
        features = pad_left(features)
    dtype = model.network.dtype
    inputs = {
        name: value.to(model.device, dtype if value.is_floating_point() else value.dtype)
        for name, value in features.items()
    }
    if rewrites:
        inputs |= {name: functional.pad(inputs[name], (0, 1)) for name in ("input_ids", "attention_mask")}
    network: Any = model.network
    if not model.parts.reads_images and model.context is not None:
        # Learnt positions end with the context. An image's tokens would have to be counted, too.
        longest = max(1, min(longest, model.context - features["input_ids"].shape[1]))
    with ExitStack() as stack:
        if len(images) >= PACKED_ROWS:
            stack.enter_context(packed_linears(network))
        hooks = [] if plain else stack.enter_context(decoding_hooks(model, decoding, features, len(images)))
        bans = [RowBans(banned)] if any(banned) else []
        # The checkpoint's other settings were reset when it was loaded.
        written = network.generate(
            **inputs,
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([*hooks, *bans]),
        )
    # Decoder-only networks return the prompt too, except those that get embeddings (BLIP-2).
    if not model.parts.encoder_decoder:
        prompt = features["input_ids"]
        if torch.equal(written[:, : prompt.shape[1]].cpu(), prompt):
            written = written[:, prompt.shape[1] :]
    ends = end_tokens(model)
    # An encoder-decoder's output begins with its start token. Views write what their image writes.
    tokens = written[: len(images)].tolist()
    return [split_at_special(row, ends, begun=not model.parts.encoder_decoder) for row in tokens]


def check_decoding(model: LoadedModel, decoding: Decoding) -> None:
    """Write a token by a decoding about an image of noise; raises InputError if the model's family can't have it."""
    if not decoding.plain:
        generate(model, [prompt_text(model, None, "en")], [noise_image()], 1, decoding)


def end_tokens(model: LoadedModel) -> set[int]:
    """Return the tokens that end a caption: the tokenizer's special ones, and those that generation stops at.

    The latter need not be special: BLIP-2's OPT stops at a line break.
    """
    stops: int | list[int] | None = model.network.generation_config.eos_token_id
    return {*model.tokenizer.all_special_ids, *([stops] if isinstance(stops, int) else stops or [])}


def token_text(model: LoadedModel, token: int) -> str:
    """Return a token for people to read, without the space before it; a blank token shows its own spelling."""
    text = model.tokenizer.decode([token]).strip()
    return text or str(model.tokenizer.convert_ids_to_tokens(token))


def caption_of(model: LoadedModel, tokens: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of generated tokens, and the characters `(start, stop)` that each token covers."""

    def decode(count: int) -> str:
        # With all tokens before: one alone may be part of a character, or lose its space. Without clean-up, which
        # removes spaces before punctuation and so would move characters from one token to the next.
        return str(model.tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)).lstrip()

    text = decode(len(tokens))
    lengths = [len(decode(count)) for count in range(1, len(tokens) + 1)]
    # Part of a character may decode to several replacement characters, and the text then shrinks with the next token.
    stops = list(accumulate(reversed(lengths), min))[::-1]
    return text, list(pairwise([0, *stops]))


def split_at_special(tokens: list[int], special: set[int], *, begun: bool = True) -> tuple[list[int], int | None]:
    """Return the tokens before the first special one, and that one; None without any.

    Without `begun`, leading special tokens are dropped first.
    """
    start = 0 if begun else next((index for index, token in enumerate(tokens) if token not in special), len(tokens))
    stop = next((index for index, token in enumerate(tokens[start:], start) if token in special), len(tokens))
    return tokens[start:stop], tokens[stop] if stop < len(tokens) else None
