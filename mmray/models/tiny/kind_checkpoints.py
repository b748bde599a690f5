"""Tiny checkpoints of the types in `KINDS`, from each type's own default configuration.

`build("glm4v", folder)` shrinks the default configuration, and joins the type's own image processor and processor with
a small tokenizer that has the special tokens which the processor's source names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from mmray.models.tiny.checkpoints import randomise, template_of, tokenizer_of
from mmray.models.tiny.kinds import HEADS, KINDS, WIDE, Kind
from mmray.models.tiny.pieces import LAYERS, PATCH, SIDE, SQUARE, WIDTH, Variant

GROUPS = (
    (WIDTH, "hidden_size d_model embed_dim out_hidden_size projection_dim text_hidden_size output_dim hidden_dim"),
    (WIDTH, "projector_hidden_size projection_hidden_size encoder_hidden_size embed_size"),
    (LAYERS, "num_hidden_layers num_layers depth encoder_layers decoder_layers layers"),
    (HEADS, "num_attention_heads num_key_value_heads num_heads attention_heads encoder_attention_heads index_n_heads"),
    (HEADS, "decoder_attention_heads linear_num_key_heads linear_num_value_heads num_sliding_attention_heads"),
    (WIDE, "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp"),
    (WIDE, "shared_intermediate_size dense_intermediate_size"),
    (16, "head_dim d_kv qk_head_dim linear_value_head_dim num_position_embeddings"),
    (8, "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim"),
    (8, "hidden_size_per_layer_input index_head_dim rotary_dim patch_size"),
    (4, "n_routed_experts num_experts num_local_experts moe_num_experts num_query_tokens"),
    (2, "num_experts_per_tok moe_k moe_topk top_k_experts mlp_ratio"),
    (1, "n_group topk_group first_k_dense_replace"),
    (40, "moe_intermediate_size share_expert_dim"),
    (56, "shared_expert_intermediate_size"),
    (64, "sliding_window"),
    (512, "max_position_embeddings"),
    (SIDE, "image_size"),
)
SIZES = {name: size for size, names in GROUPS for name in names.split()}
"""What settings of these names are set to, wherever they are in a configuration."""
OPTIONAL = ("sliding_window", "q_lora_rank", "intermediate_size_mlp", "head_dim", "num_key_value_heads")
"""Left at None."""
PLACEHOLDERS = ("image_token_id", "image_token_index", "image_patch_id")


def build(name: str, folder: Path) -> Path:
    """Write the type's checkpoint into the folder, the same bytes at every call, and return the folder.

    A name may be a type and what sets this one apart from others of the type.
    """
    kind, name = KINDS[name], name.partition(" ")[0]
    made = getattr(transformers, kind.processor or PROCESSOR_MAPPING_NAMES[name])
    tokens, named = _tokens(made)
    named |= kind.named
    facts = Variant(name, {}, {}, "", "", {}, named=named, tokens=(*tokens, *kind.tokens, "<reserved>"), adds=kind.adds)
    tokenizer = tokenizer_of(facts)
    if kind.unknown:
        tokenizer.unk_token = "<pad>"
    tokenizer.init_kwargs |= kind.overruled
    processor = made(tokenizer=tokenizer, **_parts(name, kind, made), **kind.options)
    image = kind.image or str(processor.image_token if hasattr(processor, "image_token") else "<image>")
    if kind.template:
        processor.chat_template = template_of("", "USER: ", f"{image}\n", " ", "ASSISTANT:")
    processor.save_pretrained(folder)
    settings = shrunk(deepcopy(dict(kind.base)) or CONFIG_MAPPING[name]().to_dict(), {**SIZES, **kind.sizes})
    placeholder = tokenizer.convert_tokens_to_ids(kind.placeholder or image)
    _set_tokens(settings, processor, named, placeholder)
    _merge(settings, kind.config)
    network = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name].from_dict(settings), dtype=torch.float32)
    randomise(network, name)
    network.generation_config.update(**_special(tokenizer))
    network.eval().save_pretrained(folder)
    return folder


def shrunk(settings: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Set every size in a configuration, at any depth, and keep one layer of each kind."""
    for key, value in settings.items():
        if isinstance(value, dict):
            shrunk(value, sizes)
        elif key in sizes and isinstance(value, list):
            settings[key] = [sizes[key]] * len(value)
        # A bool is an int in Python, and None switches an optional part off.
        elif key in sizes and not isinstance(value, bool) and not (value is None and key in OPTIONAL):
            settings[key] = type(value)(sizes[key]) if isinstance(value, float) else sizes[key]
        # Every kind of layer comes once, as far as there are layers; a tiny model of one kind would prove less.
        elif str(key).endswith("layer_types") and value:
            settings[key] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
    return settings


def _tokens(processor: type) -> tuple[list[str], dict[str, str]]:
    """Return the special tokens in a processor's source, and those that it asks the tokenizer for by name."""
    # From the source, because no attribute of a processor lists the tokens that it asks for.
    source = inspect.getsource(inspect.getmodule(processor) or processor)
    usual = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")
    asked = re.findall(r'tokenizer\.(\w+_token)(?:_id)?\b|tokenizer, "(\w+_token)"', source)
    named: dict[str, str] = {}
    for name in dict.fromkeys(first or second for first, second in asked):
        default = re.search(rf'{name}(?:: str)? = "([^"]+)"|{name}"\) else "([^"]+)"|{name}", "([^"]+)"\)', source)
        if name not in usual:
            named[name] = next(filter(None, default.groups())) if default else f"<{name}>"
    return list(dict.fromkeys(re.findall(r'"(<[^"\s{}]{1,40}>|\[[A-Z_/]+\])"', source))), named


def _parts(name: str, kind: Kind, processor: type) -> dict[str, Any]:
    """Return the processor's parts: for images, and for videos and sounds where it asks for them."""
    asked = inspect.signature(processor).parameters
    mapped = IMAGE_PROCESSOR_MAPPING_NAMES.get(name) or {}
    made = getattr(transformers, kind.image_processor or mapped.get("torchvision") or mapped["pil"])
    settings = dict(kind.image_settings)
    if isinstance(getattr(made, "patch_size", None), int):
        settings.setdefault("patch_size", PATCH)
    if size := getattr(made, "size", None):
        settings.setdefault("size", _small(size if isinstance(size, dict) else vars(size)))
    if getattr(made, "crop_size", None):
        settings.setdefault("crop_size", SQUARE)
    parts: dict[str, Any] = {"image_processor": made(**settings)}
    if "video_processor" in asked:
        mapped = VIDEO_PROCESSOR_MAPPING_NAMES.get(name)
        video = mapped["torchvision"] if isinstance(mapped, dict) else mapped or "Qwen2VLVideoProcessor"
        parts["video_processor"] = getattr(transformers, video)(**kind.video_settings)
    if "feature_extractor" in asked:
        sound = FEATURE_EXTRACTOR_MAPPING_NAMES.get(name) or "WhisperFeatureExtractor"
        parts["feature_extractor"] = getattr(transformers, sound)()
    if "patch_size" in asked and "patch_size" not in kind.options:
        parts["patch_size"] = PATCH
    return parts


def _small(size: Mapping[str, int | None]) -> dict[str, int]:
    """Return a size of images of the same form: the lengths of edges or, where they are large, numbers of pixels."""
    given = {key: value for key, value in size.items() if value is not None}
    # Limits of the number of pixels have names of edges, too, but are in the millions.
    if max(given.values()) <= 5_000:
        return dict.fromkeys(given, SIDE)
    return {key: SIDE**2 if key == "shortest_edge" else 4 * SIDE**2 for key in given}


def _special(tokenizer: Any) -> dict[str, int]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def _set_tokens(settings: dict[str, Any], processor: Any, named: Mapping[str, str], placeholder: int) -> None:
    """Set the vocabulary's size and the ids of all tokens in a configuration, at any depth."""
    tokenizer = processor.tokenizer
    known = _special(tokenizer) | {"decoder_start_token_id": tokenizer.pad_token_id}
    for key, value in settings.items():
        if isinstance(value, dict):
            _set_tokens(value, processor, named, placeholder)
        elif key in ("vocab_size", "vocab_size_per_layer_input"):
            settings[key] = len(tokenizer)
        elif key in known or key in PLACEHOLDERS:
            settings[key] = known.get(key, placeholder)
        elif isinstance(value, int) and (role := re.fullmatch(r"(\w+_token)_(id|index)", str(key))):
            token = getattr(processor, role[1], None) or named.get(role[1], "<reserved>")
            settings[key] = tokenizer.convert_tokens_to_ids(str(token))


def _merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        # Numbers of layers that a tiny model does not have would stay.
        if isinstance(value, dict) and isinstance(settings.get(key), dict) and key != "per_layer_config":
            _merge(settings[key], value)
        else:
            settings[key] = value
