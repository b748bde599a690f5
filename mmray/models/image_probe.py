"""Find how the image enters a model of unknown type, by running it on an image and on the same one half as bright."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.processing import IMAGE_MASK, example_inputs


@torch.no_grad()
def image_entry(model: PreTrainedModel, first_block: str, processor: Any) -> tuple[str, int | None]:
    """Return `tokens` with the placeholder's token id (None if the inputs mark the positions), or `cross-attention`.

    The image's positions are those where the input of the decoder's first block changes with the image; all of them
    have one token in `input_ids`, which is nowhere else. If no position changes, or the last one does, the decoder
    attends to the image. Raises InputError if the image enters in another way.
    """
    kind = model.config.model_type
    entered: list[Tensor] = []
    block = model.get_submodule(first_block)

    def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered.append(next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor)))

    inputs = example_inputs(kind, processor, model.config)
    with block.register_forward_pre_hook(enter, with_kwargs=True):
        for given in (inputs, example_inputs(kind, processor, model.config, brightness=0.5)):
            try:
                model(**placed(model, given))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())[:120]
                raise InputError(f"{kind}: a forward with an image failed ({reason})") from error
    tokens = inputs["input_ids"][0]
    first, second = (hidden.flatten(0, -2) for hidden in entered)
    if first.shape != second.shape or len(first) != len(tokens):
        raise InputError(
            f"{kind}: {len(first)} positions in the decoder for {len(tokens)} tokens; "
            "models that put the image in other places than its tokens can't be analysed"
        )
    changed = (first != second).any(dim=-1).to(tokens.device)
    if not changed.any() or changed[-1]:
        return "cross-attention", None
    if IMAGE_MASK in inputs and torch.equal(changed, inputs[IMAGE_MASK][0] == 1):
        return "tokens", None
    placeholders = torch.unique(tokens[changed])
    if len(placeholders) != 1 or torch.isin(tokens[~changed], placeholders).any():
        raise InputError(f"{kind}: the image changes positions of {len(placeholders)} different tokens in the prompt")
    return "tokens", int(placeholders)


def placed(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs on the model's device, floating-point ones in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
