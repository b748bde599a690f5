"""Tiny networks with their processors and inputs."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "pad_token_id")
"""Settings that every decoder's configuration has."""


@dataclass(frozen=True)
class Loaded:
    """A tiny network in evaluation mode, its processor, and inputs of one image with a question."""

    network: transformers.PreTrainedModel
    processor: Any
    inputs: dict[str, torch.Tensor]

    def variation(self, dtype: torch.dtype = torch.float32, **settings: Any) -> transformers.PreTrainedModel:
        """Return an untrained network of the same family whose decoder's configuration differs in these settings."""
        config = self.network.config.to_dict()
        if "model_type" in settings:
            config["text_config"] = {name: config["text_config"][name] for name in COMMON}
        config["text_config"] |= settings
        made = transformers.AutoConfig.for_model(**config)
        return transformers.AutoModelForImageTextToText.from_config(made, dtype=dtype)
