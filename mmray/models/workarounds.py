"""Repairs of faults in transformers and torch: a forward fails, depends on its batch, or copies the unembedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel


def work_around(network: PreTrainedModel) -> None:
    """Repair what is known to be wrong in this network's type; changes nothing where the fault is gone."""
    if network.config.model_type == "llama4":
        # As of 5.24, the whole reads `image_outputs` from its decoder's output, which does not have it.
        network.get_submodule("language_model").register_forward_hook(_with_image_outputs)
    if network.config.model_type == "hunyuan_vl":
        # As of 5.24, one of an image's rotary positions is its number, which counts through all rows of a batch.
        inner: Any = network.get_submodule("model")
        inner.get_rope_index = _by_row(inner.get_rope_index)
    head = network.get_output_embeddings()
    if isinstance(head, nn.Linear):
        # The last position's states are a strided view. As of torch 2.13, Linear then copies its weights once per row
        # of the batch: of 49,152 tokens and 24 rows that takes 2.7 GB, and most of the time of writing short captions.
        head.register_forward_pre_hook(_contiguous)


def _with_image_outputs(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _by_row(positions_of: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function of positions, called for each row of the batch alone."""

    def by_row(
        input_ids: Int[Tensor, "row position"],
        mm_token_type_ids: Int[Tensor, "row position"],
        image_grid_thw: Int[Tensor, "image 3"] | None = None,
        attention_mask: Int[Tensor, "row position"] | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        found, first = [], 0
        for row in range(len(input_ids)):
            of_image = mm_token_type_ids[row] == 1
            if attention_mask is not None:
                of_image = of_image[attention_mask[row].bool()]
            # An image is a run of its tokens.
            images = int(of_image.sum() - (of_image[1:] & of_image[:-1]).sum())
            found.append(
                positions_of(
                    input_ids=input_ids[row : row + 1],
                    mm_token_type_ids=mm_token_type_ids[row : row + 1],
                    image_grid_thw=None if image_grid_thw is None else image_grid_thw[first : first + images],
                    attention_mask=None if attention_mask is None else attention_mask[row : row + 1],
                    **others,
                )
            )
            first += images
        positions, deltas = zip(*found, strict=True)
        return torch.cat(positions, dim=1), torch.cat(deltas)

    return by_row


def _contiguous(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *others = arguments
    return (states.contiguous(), *others)
