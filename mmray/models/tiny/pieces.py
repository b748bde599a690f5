"""What the families' tiny checkpoints are put together from: decoders, towers, image processing, tokens, turns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIDTH, LAYERS, HEADS, SIDE, PATCH = 32, 2, 4, 32, 8
PLACES = (SIDE // PATCH) ** 2
"""Patches of one image."""


@dataclass(frozen=True)
class Variant:
    """What sets one family's checkpoint apart. A value that names a special token stands for the token's id."""

    config: str
    """Model type."""
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    processor: str
    image_processor: str
    image_settings: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the model's configuration."""
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    video_processor: str | None = None
    specials: tuple[str, str, str] = ("<s>", "</s>", "<pad>")
    """Beginning of sequence, end of sequence, padding."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks the tokenizer for by name."""
    tokens: tuple[str, ...] = ()
    """Further special tokens."""
    beyond: tuple[str, ...] = ()
    """Special tokens with the last ids, which have an embedding and no row in the unembedding."""
    adds: str = ""
    """`bos`, `eos` or `both`: what the tokenizer itself puts before or after every text."""
    padding_side: str = "left"
    template: tuple[str, ...] = ()
    """Chat template: start, opening of the user's turn, image, closing of a turn, opening of the assistant's turn."""
    qformer_tokenizer: bool = False


SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS, "intermediate_size": 48}
LLAMA = GROUPED | {"model_type": "llama", "tie_word_embeddings": False}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}
QWEN2 = LLAMA | {"model_type": "qwen2"}
GEMMA = GROUPED | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
# Rotary positions in time, height and width share the halves of a head between them.
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
OPT = SHAPE | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "tie_word_embeddings": True}
OPT |= {"max_position_embeddings": 256, "dropout": 0.0}
FLAN_T5 = {
    "model_type": "t5",
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": "<pad>",
}
EYES = SHAPE | {"intermediate_size": 40, "image_size": SIDE, "patch_size": PATCH}
CLIP = EYES | {"model_type": "clip_vision_model"}
SIGLIP = EYES | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_EYES = {"depth": LAYERS, "num_heads": HEADS, "patch_size": PATCH}
QFORMER = SHAPE | {"intermediate_size": 40, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
SQUARE = {"height": SIDE, "width": SIDE}
CLIP_IMAGES = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
QWEN_IMAGES = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": SIDE**2, "longest_edge": 2 * SIDE**2}}

CHATML = ("", "<|im_start|>user\n", "<image>\n", "<|im_end|>\n", "<|im_start|>assistant\n")
VICUNA = ("", "USER: ", "<image>\n", " ", "ASSISTANT:")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDEFICS_MARKS: tuple[str, ...] = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<image>")
IDEFICS_MARKS += tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS_TURNS = ("User:", "<image>", "<end_of_utterance>\n", "Assistant:")
