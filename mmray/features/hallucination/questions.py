"""Ask a joint model about embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.detector.joint import JointModel
from mmray.models.options import LONGEST
from mmray.models.prompting import encode


def replies(
    joint: JointModel,
    prompts: Sequence[str],
    images: Sequence[Image],
    embedding: Float[Tensor, "row place width"],
    at_once: int,
    longest: int = LONGEST,
) -> Iterator[tuple[list[int], Float[Tensor, "token hidden"]]]:
    """Yield the tokens of the greedy reply to each prompt, asked about the embedding in its place, and what entered the
    final norm where each token was predicted.

    `images` are those that the embeddings began as: only their size matters, which the image's tokens may depend on.
    """
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        none: list[list[int]] = [[] for _ in prompts[part]]
        batch = encode(joint.model, prompts[part], images[part], none, [[] for _ in none])
        yield from zip(*joint.generate(batch, embedding[part], longest), strict=True)
