"""Ask a joint model about embeddings: replies, and answers read from them, or none where they can't be read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.errors import InputError
from mmray.evaluation.hallucination import YES_OR_NO
from mmray.models.prompting import LONGEST, encode
from mmray.perception.joint import JointModel

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def replies(
    joint: JointModel,
    prompts: Sequence[str],
    images: Sequence[Image],
    embedding: Float[Tensor, "row place width"],
    at_once: int,
    longest: int = LONGEST,
) -> list[list[int]]:
    """Return the tokens of the greedy replies, each prompt asked about the row of the embedding in its place.

    `images` are those that the embeddings began as: only their size matters, which the image's tokens may depend on.
    """
    written: list[list[int]] = []
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        none: list[list[int]] = [[] for _ in prompts[part]]
        batch = encode(joint.model, prompts[part], images[part], none, [[] for _ in none])
        written += joint.generate(batch, embedding[part], longest)
    return written


def reader(parse: str) -> re.Pattern[str]:
    """Return what finds an answer in a reply: `yes_no`, `number`, or words between bars such as `man|woman`.

    Raises InputError for anything else.
    """
    if parse in ("yes_no", "number"):
        return YES_OR_NO if parse == "yes_no" else NUMBER
    words = [word.strip() for word in parse.split("|")]
    if len(words) != 2 or not all(words):
        raise InputError(f"parse {parse!r}: give yes_no, number, or two words such as man|woman")
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def value_of(reply: str, parse: str) -> float | None:
    """Return the first answer in a reply: a number; or 1 for yes and for the first of two words, else 0.

    None where there is none: a reply that can't be read is no answer.
    """
    found = reader(parse).search(reply)
    if found is None:
        return None
    if parse == "number":
        return float(found[0])
    first = "yes" if parse == "yes_no" else parse.split("|")[0].strip()
    return float(found[0].casefold() == first.casefold())
