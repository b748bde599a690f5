"""Repairs of faults in transformers that would make every forward of a type fail."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def work_around(network: PreTrainedModel) -> None:
    """Repair what is known to fail in this network's type; does nothing where the fault is gone."""
    if network.config.model_type == "llama4":
        # As of 5.24, the whole reads `image_outputs` from its decoder's output, which does not have it.
        network.get_submodule("language_model").register_forward_hook(_with_image_outputs)


def _with_image_outputs(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
