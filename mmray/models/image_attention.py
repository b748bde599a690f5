"""Amplify what the last position attends to image tokens, in the attention function that a decoder calls.

Liu et al. 2024, *Paying More Attention to Image* (PAI, arXiv 2407.21771), equation 3: before the softmax, the logits a
of the last position's attention to image tokens become a + α · |a|, in all heads, without the first layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmray.errors import InputError
from mmray.models.blocks import block_of
from mmray.models.decodings import PAI_FIRST
from mmray.models.loading import LoadedModel

EXTRAS = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions for terms that `attended` lacks: a cap of the logits, sinks, and biases."""
Attention = Callable[..., tuple[Tensor, Tensor | None]]


class ImageAttention:
    """Amplified attention of one model to the image columns of one batch of prompts."""

    def __init__(self, model: LoadedModel, columns: Bool[Tensor, "row column"], alpha: float) -> None:
        self.model, self.columns, self.alpha = model, columns, alpha
        self.paused = False
        """While logits without the image are computed."""
        layers = len(model.widths)
        self.layers: dict[nn.Module, int] = {
            module: layer
            for layer in range(round(layers * PAI_FIRST), layers)
            for module in block_of(model, layer).modules()
        }
        self.calls: dict[nn.Module, int] = {}
        """By attention module: its forwards so far."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Amplify inside the `with` block, which is one call of `generate`.

        Raises InputError if the attention of some layer does not go through transformers' attention functions, or has
        terms that are unknown here.
        """
        kind = self.model.network.config.get_text_config()._attn_implementation
        if kind not in ALL_ATTENTION_FUNCTIONS:
            raise self._refused(f"its attention is {kind!r}, which is not among transformers' attention functions")
        base: Attention = ALL_ATTENTION_FUNCTIONS[kind]

        def amplified(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **more: Any) -> Any:
            output, weights = base(module, query, key, value, *mask, **more)
            if self.paused or module not in self.layers:
                return output, weights
            seen = mask[0] if mask else more.get("attention_mask")
            return self._replaced(module, output, query, key, value, seen, more), weights

        # An override on this object, over the function that is registered for all.
        ALL_ATTENTION_FUNCTIONS[kind] = amplified
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[kind]
        if len({self.layers[module] for module in self.calls}) < len(set(self.layers.values())):
            raise self._refused("not all layers call transformers' attention functions")

    def _replaced(
        self,
        module: nn.Module,
        output: Float[Tensor, "row position head size"],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        more: dict[str, Any],
    ) -> Float[Tensor, "row position head size"]:
        """Return the attention's output with that of the last position computed anew."""
        if unknown := [name for name in EXTRAS if more.get(name) is not None]:
            raise self._refused(f"its attention has a term ({unknown[0]}) that can't be amplified")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise self._refused("its attention mask has no row per position; load it with sdpa attention")
        calls = self.calls[module] = self.calls.get(module, 0) + 1
        prompt = self.columns.shape[1]
        # One column more per token written: otherwise columns are no longer those of the prompt.
        if key.shape[2] != prompt + calls - 1:
            raise self._refused("its cache does not keep all positions of the prompt")
        image = nn.functional.pad(self.columns.to(key.device), (0, calls - 1))
        last = None if mask is None else mask[:, :, -1, : key.shape[2]]
        scaling = more.get("scaling")
        found = attended(query[:, :, -1], key, value, last, image, self.alpha, scaling)
        output = output.clone()
        output[:, -1] = found.to(output)
        return output

    def _refused(self, reason: str) -> InputError:
        return InputError(f"{self.model.name}: amplified attention (pai) can't be applied: {reason}")


def attended(
    query: Float[Tensor, "row head size"],
    key: Float[Tensor, "row group column size"],
    value: Float[Tensor, "row group column out"],
    mask: Tensor | None,
    image: Bool[Tensor, "row column"],
    alpha: float,
    scaling: float | None,
) -> Float[Tensor, "row head out"]:
    """Return what one position attends to, its logits a to image columns as a + α · |a|, in fp32.

    `mask` is added, or where it is boolean says which columns are seen.
    """
    heads = query.shape[1] // key.shape[1]
    keys, values = (one.float().repeat_interleave(heads, dim=1) for one in (key, value))
    logits = (query.float()[:, :, None] @ keys.transpose(2, 3))[:, :, 0] * (scaling or query.shape[-1] ** -0.5)
    logits = torch.where(image[:, None], logits + alpha * logits.abs(), logits)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    return (logits.softmax(dim=-1)[:, :, None] @ values)[:, :, 0]
