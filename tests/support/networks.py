"""Tiny networks with their processors and inputs."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image

from mmray.models.tiny.checkpoints import SENTENCES
from mmray.models.tiny.variants import VARIANTS

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


def example(variant: str, processor: Any) -> dict[str, torch.Tensor]:
    """Return the model's inputs for one image, the question what it shows, and for T5 two words of an answer."""
    pixels = torch.randint(256, (40, 56, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    question = SENTENCES[3]
    if VARIANTS[variant].template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        question = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    elif variant == "paligemma":
        question = f"<image>{question}"
    image = Image.fromarray(pixels.numpy())
    inputs = dict(processor(text=question, images=image, return_tensors="pt"))
    if VARIANTS[variant].text.get("model_type") == "t5":
        answer = processor.tokenizer(" a dog", add_special_tokens=False).input_ids
        inputs["decoder_input_ids"] = torch.tensor([[processor.tokenizer.pad_token_id, *answer]])
    return inputs
