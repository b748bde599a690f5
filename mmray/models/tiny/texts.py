"""Tiny checkpoints of text-only model types, with random weights."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from mmray.models.tiny.checkpoints import tokenizer_of
from mmray.models.tiny.pieces import HEADS, LAYERS, WIDTH

SPECIALS = ("<s>", "</s>", "<pad>")
CONTEXT = 64
SHAPE: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": CONTEXT}
GROUPED = SHAPE | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": WIDTH // HEADS}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"tie_word_embeddings": False},
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEADED,
    "gemma": HEADED,
    "gemma2": HEADED | {"final_logit_softcapping": 30.0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": HEADED | {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": HEADED
    | {"layer_types": ["sliding_attention", "full_attention"], "intermediate_size": [48] * LAYERS}
    | {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0}
    | {"activation_sparsity_pattern": [0.5, 0.0], "vocab_size_per_layer_input": 256},
    "phi3": GROUPED,
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 48, "n_positions": CONTEXT},
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "opt": {name: SHAPE[name] for name in SHAPE if name != "intermediate_size"}
    | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "gpt_neox": SHAPE,
}
"""Model type → its configuration."""
PROBED: dict[str, dict[str, Any]] = {
    "olmo2": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "gpt_oss": HEADED
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * LAYERS}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "falcon": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_hidden_size": 48},
}
"""The same for types that no table knows."""


def build(family: str, folder: Path) -> Path:
    """Write a family's checkpoint with seeded random weights, and return the folder."""
    facts: Any = SimpleNamespace(specials=SPECIALS, named={}, tokens=(), beyond=(), padding_side="left")
    # Llama's tokenizer begins a text itself; GPT-2's does not.
    facts.adds = "bos" if family in ("llama", "mistral", "gemma2") else ""
    tokenizer = tokenizer_of(facts)
    model = network_of(family, FAMILIES.get(family) or PROBED[family], len(tokenizer))
    seeded = torch.Generator().manual_seed(zlib.crc32(family.encode()))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=seeded)
            gain = weight.dim() == 1 and bool((weight == 1).all())
            weight.copy_(1 + 0.1 * noise if gain else 0.2 * noise)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def network_of(family: str, settings: dict[str, Any], vocabulary: int) -> Any:
    """Return an untrained network of a type with these settings."""
    config = transformers.AutoConfig.for_model(
        family, **settings, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
