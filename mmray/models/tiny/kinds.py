"""Model types outside the table of families: what a tiny checkpoint of each needs besides the common sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmray.models.tiny.pieces import LAYERS, PATCH, SIDE, SQUARE, WIDTH

FOURFOLD = {"height": 4 * SIDE, "width": 4 * SIDE}
FULL = {"height": 16 * SIDE, "width": 16 * SIDE}
TWICE = {"height": 2 * SIDE, "width": 2 * SIDE}
PIXELS = {"size": {"shortest_edge": SIDE**2, "longest_edge": 8 * SIDE**2}}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
HEADS, WIDE = 2, 48


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
    overruled: Mapping[str, Any] = field(default_factory=dict)
    """Image settings that the processor has defaults of its own for: it takes others from the tokenizer alone."""
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
    needs: str = ""
    """A library that transformers runs the type with."""


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
    "cohere_compass": Kind(
        config={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    name: {"rope_type": "default", "rope_theta": 1e4}
                    for name in ("sliding_attention", "full_attention")
                },
            }
        }
    ),
    "cosmos3_edge": Kind(config={"text_config": rotary(2, 3, 3)}),
    "cosmos3_omni": Kind(processor="Qwen3VLProcessor"),
    # It has as many tokens as queries, of which there are 144 for a tile and 256 for an image.
    "deepseek_ocr2": Kind(
        config={
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
            },
            "vision_config": {
                "sam_config": {
                    "downsample_channels": [WIDE, WIDTH],
                    "output_channels": WIDTH,
                    "mlp_dim": WIDE,
                    "global_attn_indexes": [],
                }
            },
        },
        sizes={"image_size": 16 * SIDE},
        image_settings={"size": FULL, "tile_size": 12 * SIDE},
    ),
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
    "fast_vlm": Kind(
        needs="timm",
        config={
            "image_seq_length": 16,
            "vision_config": {
                "architecture": "fastvit_t8",
                "hidden_size": 768,
                "model_args": {"inference_mode": True},
                "pretrained_cfg": {},
            },
        },
        image_settings={"size": {"shortest_edge": 4 * SIDE}, "crop_size": FOURFOLD},
        options={"patch_size": SIDE, "vision_feature_select_strategy": "full"},
        image_processor="CLIPImageProcessor",
        processor="LlavaProcessor",
    ),
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
    "gemma3n": Kind(
        needs="timm",
        config={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "intermediate_size": [WIDE] * LAYERS,
                "activation_sparsity_pattern": [0.5, 0.0],
                "num_kv_shared_layers": 0,
                "laurel_rank": 4,
            },
            "vision_config": {"hidden_size": 2048, "model_args": {"channel_multiplier": 0.05}},
            "audio_config": {
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "sscp_conv_channel_size": [8, 4],
            },
        },
        image_settings={"size": SQUARE},
    ),
    "gemma4_unified": Kind(
        config={
            "text_config": {"per_layer_config": {"1": {"head_dim": 16}}},
            "vision_config": {"model_type": "gemma4_unified_vision", "patch_size": PATCH, "pooling_kernel_size": 3},
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
    # Its processor writes 256 tokens whatever it gets.
    "got_ocr2": Kind(
        config={"vision_config": {"global_attn_indexes": [], "output_channels": WIDTH, "mlp_dim": WIDE}},
        sizes={"image_size": 16 * SIDE},
        image_settings={"size": FULL},
        image="<img><imgpad></img>",
        placeholder="<imgpad>",
    ),
    "granite4_vision": Kind(
        config={
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "spatial_target_layers": [0, 0, 1, 1],
            "image_grid_pinpoints": GRID,
            "qformer_config": {"encoder_hidden_size": 64},
        },
        sizes={"hidden_size": 64},
        image_settings={"image_grid_pinpoints": GRID, "size": {"shortest_edge": SIDE}},
        options={
            "downsample_rate": "1/2",
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "granite_docling": Kind(
        config={"vision_config": {"deepstack_visual_indexes": [0, 1]}},
        sizes={"image_size": 2 * SIDE},
        image_settings={"size": TWICE, "max_patches": 2},
        options={"image_seq_len": 4},
        named={"image_token": "<image>"},
    ),
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
        overruled={"max_patches": 64},
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
    "mistral_large4": Kind(
        config={"text_config": {"kv_source_layers": [0, 1], "head_dim": 8}},
        image_settings={"size": {"longest_edge": SIDE}},
        options={"spatial_merge_size": 2},
    ),
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
    "perception_lm": Kind(
        needs="timm",
        config={
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "embed_dim": WIDTH,
                    "depth": LAYERS,
                    "num_heads": HEADS,
                    "img_size": [SIDE, SIDE],
                    "patch_size": PATCH,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [4, 4],
                },
            }
        },
        image_settings={"tile_size": SIDE, "vision_input_type": "vanilla"},
        options={"patch_size": PATCH, "pooling_ratio": 1},
    ),
    "pix2struct": Kind(image_settings={"max_patches": 64}, template=False),
    "pp_chart2table": Kind(named={"image_token": "<image>"}),
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
