"""Tiny random checkpoints of transformers' model types outside the table of families, from each type's own defaults.

`build("glm4v", folder)` shrinks the default configuration, and joins the type's own image processor and processor with
a small tokenizer that has the special tokens which the processor's source names. `KINDS` holds what that leaves open.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from tests.support.pieces import Variant
from tests.support.tiny import randomise, template_of, tokenizer_of

WIDTH, SIDE, PATCH = 32, 32, 8
SQUARE = {"height": SIDE, "width": SIDE}
TWICE = {"height": 2 * SIDE, "width": 2 * SIDE}
PIXELS = {"size": {"shortest_edge": SIDE**2, "longest_edge": 8 * SIDE**2}}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
LAYERS, HEADS, WIDE = 2, 2, 48
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


@dataclass(frozen=True)
class Kind:
    """What one type needs besides the common sizes."""

    base: Mapping[str, Any] = field(default_factory=dict)
    """In place of the default configuration."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Merged into the shrunk default configuration."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """In place of those in SIZES."""
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the processor."""
    processor: str = ""
    """Class; if empty, transformers' own for the type."""
    image_processor: str = ""
    tokens: tuple[str, ...] = ()
    """Special tokens that the processor's source does not name."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks the tokenizer for by name."""
    image: str = ""
    """What the prompt has in the image's place; if empty, the processor's image token."""
    placeholder: str = ""
    """The token that the image replaces, if another."""
    template: bool = True
    adds: str = ""
    """As `Variant.adds`."""
    unknown: bool = False
    """The processor needs a token for unknown text."""


def rotary(*sections: int, **settings: Any) -> dict[str, Any]:
    """Return the settings of rotary positions whose axes share the halves of a head between them."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)} | settings}


GLM = Kind(config={"text_config": rotary(2, 3, 3, partial_rotary_factor=1.0)}, image_settings=PIXELS)
GLM_WITHOUT = Kind(config=GLM.config, image_settings=PIXELS, processor="Glm46VProcessor")
INSERTED = Kind(config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}})

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def captioner(decoder: str, **settings: int) -> Kind:
    """Return an image captioner of a ViT and a text decoder; sizes in `settings` that SIZES has are set later."""
    return Kind(
        base={
            "encoder": {"model_type": "vit", **dict.fromkeys((*SHAPE, "image_size", "patch_size"), 0)},
            "decoder": {"model_type": decoder, **settings, "add_cross_attention": True, "is_decoder": True}
            | dict.fromkeys(("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"), 0),
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        image_settings={"size": SQUARE},
        image_processor="ViTImageProcessor",
        processor="TrOCRProcessor",
        template=False,
    )


KINDS: dict[str, Kind] = {
    "aria": Kind(
        config={"projector_patch_to_query_dict": {"1225": 4, "4900": 8}},
        sizes={"patch_size": 14, "image_size": 490},
        image_settings={"max_image_size": 490, "min_image_size": 336},
        options={"size_conversion": {490: 4, 980: 8}},
    ),
    "aya_vision": Kind(
        config={"downsample_factor": 2},
        image_settings={"size": SQUARE},
        options={"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2},
        tokens=("TILE_GLOBAL", "TILE_1", "TILE_2", "TILE"),
        placeholder="<|IMG_PATCH|>",
    ),
    "blip": Kind(image_settings={"size": SQUARE}, template=False, adds="both"),
    "cohere2_vision": Kind(image_settings={"size": SQUARE, "patch_size": 2}),
    "cosmos3_edge": Kind(config={"text_config": rotary(2, 3, 3)}),
    "cosmos3_omni": Kind(processor="Qwen3VLProcessor"),
    "deepseek_vl": Kind(image_settings={"size": SQUARE}, options={"num_image_tokens": 16}),
    "deepseek_vl_hybrid": Kind(
        config={"high_res_vision_config": {"global_attn_indexes": [0, 1], "output_channels": WIDTH}},
        image_settings={"size": SQUARE, "high_res_size": SQUARE},
        options={"num_image_tokens": 16},
    ),
    # The video processor would write times into frames, with a font of its own.
    "ernie4_5_vl_moe": Kind(
        config={
            "text_config": rotary(3, 3, 2) | {"moe_intermediate_size": [40, 24], "mlp_layer_types": ["dense", "sparse"]}
        },
        video_settings={"draw_on_frames": False},
    ),
    "exaone4_5": Kind(),
    "florence2": Kind(
        config={
            "text_config": {"model_type": "bart"},
            "vision_config": {
                "embed_dim": [8, 8, 16, WIDTH],
                "num_heads": [1, 1, 2, 2],
                "num_groups": [1, 1, 2, 2],
                "depths": [1, 1, 1, 1],
                "patch_size": [7, 3, 3, 3],
            },
        },
        image_settings={"size": TWICE, "crop_size": TWICE, "image_seq_length": 5},
        named={"image_token": "<image_token>"},
        template=False,
    ),
    "gemma4": Kind(
        config={
            "audio_config": None,
            "text_config": {"per_layer_config": {"1": {"head_dim": 16}}},
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": WIDTH,
                "intermediate_size": WIDE,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": HEADS,
                "head_dim": 16,
                "patch_size": PATCH,
                "pooling_kernel_size": 3,
                "position_embedding_size": 256,
            },
        },
        image_settings={"patch_size": PATCH, "max_soft_tokens": 70},
    ),
    "git": Kind(
        image_settings={"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        image_processor="CLIPImageProcessor",
        template=False,
        adds="both",
    ),
    "glm46v": GLM,
    "glm4v": GLM,
    "glm4v_moe": Kind(config=GLM.config, image_settings=PIXELS, image_processor="Glm4vImageProcessor"),
    "glm_ocr": Kind(
        config=GLM.config, image_settings=PIXELS, image_processor="Glm4vImageProcessor", processor="Glm46VProcessor"
    ),
    "glmga": GLM_WITHOUT,
    "hunyuan_vl": Kind(
        config={"text_config": rotary(2, 2, 2, 2, xdrope_section=[2, 2, 2, 2]) | {"head_dim": 16}},
        image="<image_start_token><image_token><image_end_token>",
        placeholder="<image_token>",
    ),
    "hyperclovax_vision_v2": Kind(),
    "idefics": Kind(
        config={"cross_layer_interval": 1, "alpha_type": "vector", "alpha_initializer": "ones"},
        image_settings={"image_size": SIDE},
        image="<fake_token_around_image><image><fake_token_around_image>",
    ),
    "idefics2": Kind(),
    "janus": Kind(
        config={
            "vision_config": {"num_image_tokens": 16},
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1],
                "image_token_embed_dim": WIDTH,
                "latent_channels": 32,
                "num_embeddings": 16,
            },
        },
        image_settings={"size": SQUARE, "min_size": SIDE},
        options={"num_image_tokens": 16},
    ),
    "kimi_k25": Kind(config={"text_config": {"head_dim": 8}}),
    "kosmos-2": Kind(
        config={"latent_query_num": 64},
        options={"num_patch_index_tokens": 4},
        processor="Kosmos2Processor",
        template=False,
        unknown=True,
    ),
    "kosmos-2.5": Kind(
        config={"latent_query_num": 4},
        image_settings={"max_patches": 64},
        options={"num_image_tokens": 4},
        processor="Kosmos2_5Processor",
        tokens=("<image>", "</image>"),
        template=False,
    ),
    "lfm2_vl": Kind(image_settings={"encoder_patch_size": PATCH, "tile_size": SIDE}),
    "lfm3_vl": Kind(),
    "lighton_ocr": Kind(),
    "llama4": Kind(
        config={
            "text_config": {"moe_layers": [1], "no_rope_layers": [1, 0], "attention_chunk_size": 512},
            "vision_config": {
                "intermediate_size": 4 * WIDTH,
                "vision_output_dim": WIDTH,
                "projector_input_dim": WIDTH,
                "projector_output_dim": WIDTH,
            },
        },
        image_settings={"size": SQUARE},
        tokens=("<|patch|>", "<|image|>"),
        image="<|image|>",
        placeholder="<|patch|>",
    ),
    "llava_next_video": Kind(
        config={"image_grid_pinpoints": GRID, "vision_feature_layer": -2},
        image_settings={"image_grid_pinpoints": GRID, "size": {"shortest_edge": SIDE}},
    ),
    "minicpm_ocr": Kind(),
    "minicpmv4_6": INSERTED,
    "minicpmv4_7": INSERTED,
    "minimax_m3_vl": Kind(named={"image_token": "]<]image[>[", "video_token": "]<]video[>["}),
    "mistral3": Kind(image_settings={"size": {"longest_edge": SIDE}}, options={"spatial_merge_size": 2}),
    "molmo2": Kind(
        config={
            "adapter_config": {"vision_feature_layer": [0, 1], "intermediate_size": WIDE},
            "vision_config": {"image_size": [2 * SIDE, 2 * SIDE]},
        },
        sizes={"num_position_embeddings": 64},
        image_settings={"size": TWICE, "overlap_margins": [1, 1], "max_crops": 1},
        placeholder="<im_patch>",
    ),
    "muse_glimmer": Kind(sizes={"out_hidden_size": 4 * WIDTH}),
    "ovis2": Kind(
        image_settings={"size": SQUARE},
        options={"image_seq_length": 16},
        tokens=tuple(f"<IMG_{name}>" for name in ("ATOM", "START", "END", "GRID", "COL", "ROW")),
        placeholder="<IMG_ATOM>",
    ),
    "paddleocr_vl": Kind(config={"text_config": rotary(2, 3, 3)}),
    "pix2struct": Kind(image_settings={"max_patches": 64}, template=False),
    "qianfan_ocr": Kind(
        image_settings={"size": SQUARE},
        options={"image_seq_length": 4},
        tokens=("<image>",),
        image="<image>",
        placeholder="<context_image_token>",
    ),
    "qwen2_5_omni_thinker": Kind(
        config={"vision_start_token_id": 5, "text_config": rotary(2, 3, 3)},
        image_processor="Qwen2VLImageProcessor",
        processor="Qwen2_5OmniProcessor",
    ),
    "qwen3_5": Kind(),
    "qwen3_5_moe": Kind(),
    "qwen3_omni_moe_thinker": Kind(
        config={"vision_start_token_id": 5},
        image_processor="Qwen2VLImageProcessor",
        processor="Qwen3OmniMoeProcessor",
    ),
    "step3p7": Kind(
        config={"text_config": {"sliding_window": 64}},
        image_settings={"size": SQUARE, "patch_size": SIDE, "vision_patch_size": PATCH},
        image="<im_patch>",
    ),
    "t5gemma2": Kind(
        config={"encoder": {"mm_tokens_per_image": 4}, "mm_tokens_per_image": 4},
        image_settings={"size": SQUARE},
        options={"image_seq_length": 4},
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        image="<start_of_image>",
        placeholder="<image_soft_token>",
    ),
    "video_llama_3": Kind(),
    "video_llava": Kind(
        image_settings={"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}, options={"patch_size": PATCH}
    ),
    "vision-encoder-decoder": captioner("gpt2", n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=256),
    "vision-encoder-decoder with bert": captioner("bert", **dict.fromkeys(SHAPE, 0), max_position_embeddings=0),
}


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
    processor = made(tokenizer=tokenizer, **_parts(name, kind, made), **kind.options)
    image = kind.image or str(processor.image_token if hasattr(processor, "image_token") else "<image>")
    if kind.template:
        processor.chat_template = template_of("", "USER: ", f"{image}\n", " ", "ASSISTANT:")
    processor.save_pretrained(folder)
    settings = shrunk(deepcopy(dict(kind.base)) or CONFIG_MAPPING[name]().to_dict(), SIZES | kind.sizes)
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
        elif key in sizes and not isinstance(value, bool) and not (value is None and key in OPTIONAL):
            settings[key] = type(value)(sizes[key]) if isinstance(value, float) else sizes[key]
        elif str(key).endswith("layer_types") and value:
            settings[key] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
    return settings


def _tokens(processor: type) -> tuple[list[str], dict[str, str]]:
    """Return the special tokens in a processor's source, and those that it asks the tokenizer for by name."""
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
    asked = inspect.signature(processor.__init__).parameters
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
