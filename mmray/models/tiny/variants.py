"""Every family's tiny checkpoint as data: configuration, image processing, special tokens, chat template."""

from importlib.util import find_spec
from typing import Any

from mmray.models.tiny.pieces import (
    CHATML,
    CLIP,
    CLIP_IMAGES,
    EYES,
    FLAN_T5,
    GEMMA,
    GRID,
    GROUPED,
    HEADS,
    IDEFICS_MARKS,
    IDEFICS_TURNS,
    LAYERS,
    LLAMA,
    MISTRAL,
    OPT,
    PATCH,
    PLACES,
    QFORMER,
    QWEN2,
    QWEN_EYES,
    QWEN_IMAGES,
    QWEN_MARKS,
    ROTARY,
    SIDE,
    SIGLIP,
    SQUARE,
    VICUNA,
    WIDTH,
    Variant,
)

LLAVA: dict[str, Any] = {
    "text": LLAMA,
    "vision": CLIP,
    "processor": "LlavaProcessor",
    "image_processor": "CLIPImageProcessor",
    "image_settings": CLIP_IMAGES,
    "options": {"image_token_index": "<image>", "vision_feature_layer": -2, "image_seq_length": PLACES},
    "processor_options": {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "tokens": ("<image>",),
    "adds": "bos",
    "template": VICUNA,
}
QWEN_VL: dict[str, Any] = {
    "processor": "Qwen2VLProcessor",
    "image_processor": "Qwen2VLImageProcessor",
    "image_settings": QWEN_IMAGES,
    "video_processor": "Qwen2VLVideoProcessor",
    "options": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "tie_word_embeddings": False,
    },
    "specials": ("<|endoftext|>", "<|im_end|>", "<|pad|>"),
    "tokens": ("<|im_start|>", *QWEN_MARKS),
    "template": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
}
QWEN3_VL: dict[str, Any] = QWEN_VL | {
    "processor": "Qwen3VLProcessor",
    "video_processor": "Qwen3VLVideoProcessor",
    "vision": QWEN_EYES
    | {
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": PLACES,
        "deepstack_visual_indexes": [0],
    },
}
IDEFICS: dict[str, Any] = {
    "text": LLAMA,
    "vision": EYES,
    "processor": "Idefics3Processor",
    "image_processor": "Idefics3ImageProcessor",
    "image_settings": {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
    "options": {"image_token_id": "<image>", "scale_factor": 2},
    "processor_options": {"image_seq_len": PLACES // 4},
}
BLIP: dict[str, Any] = {
    "vision": EYES,
    "image_processor": "BlipImageProcessor",
    "image_settings": {"size": SQUARE},
    "options": {"image_token_index": "<image>", "num_query_tokens": 4, "qformer_config": QFORMER},
    "processor_options": {"num_query_tokens": 4},
}
OPT_TOKENS: dict[str, Any] = {"specials": ("</s>", "</s>", "<pad>"), "adds": "bos"}
T5_TOKENS: dict[str, Any] = {"specials": ("<s>", "</s>", "<pad>"), "adds": "eos", "padding_side": "right"}

VARIANTS: dict[str, Variant] = {
    "llava": Variant("llava", **LLAVA),
    "llava_next": Variant(
        "llava_next",
        **LLAVA
        | {
            "text": MISTRAL,
            "processor": "LlavaNextProcessor",
            "image_processor": "LlavaNextImageProcessor",
            "image_settings": CLIP_IMAGES | {"image_grid_pinpoints": GRID},
            "options": {"image_token_index": "<image>", "image_grid_pinpoints": GRID, "vision_feature_layer": -2},
            "template": ("", "[INST] ", "<image>\n", " [/INST]", ""),
        },
    ),
    "llava_onevision": Variant(
        "llava_onevision",
        **LLAVA
        | {
            "text": QWEN2,
            "vision": SIGLIP,
            "processor": "LlavaOnevisionProcessor",
            "image_processor": "LlavaOnevisionImageProcessor",
            "image_settings": {"size": SQUARE, "image_grid_pinpoints": GRID},
            "video_processor": "LlavaOnevisionVideoProcessor",
            "options": {
                "image_token_index": "<image>",
                "video_token_index": "<video>",
                "image_grid_pinpoints": GRID,
                "vision_feature_select_strategy": "full",
                "vision_feature_layer": -1,
                "tie_word_embeddings": False,
            },
            "processor_options": {"num_image_tokens": PLACES, "vision_feature_select_strategy": "full"},
            "specials": ("<|endoftext|>", "<|im_end|>", "<|pad|>"),
            "tokens": ("<|im_start|>", "<image>", "<video>"),
            "adds": "",
            "template": CHATML,
        },
    ),
    "vipllava": Variant(
        "vipllava",
        **LLAVA
        | {
            "options": {"image_token_index": "<image>", "vision_feature_layers": [-1, -2], "image_seq_length": PLACES},
            "template": ("", "###Human: ", "<image>\n", "", "###Assistant:"),
        },
    ),
    "qwen2_vl": Variant(
        "qwen2_vl",
        text=GROUPED | ROTARY,
        vision=QWEN_EYES | {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2},
        **QWEN_VL,
    ),
    "qwen2_5_vl": Variant(
        "qwen2_5_vl",
        text=GROUPED | ROTARY,
        vision=QWEN_EYES
        | {
            "hidden_size": WIDTH,
            "intermediate_size": 40,
            "out_hidden_size": WIDTH,
            "window_size": 2 * PATCH,
            "fullatt_block_indexes": [1],
        },
        **QWEN_VL,
    ),
    "qwen3_vl": Variant("qwen3_vl", text=GROUPED | ROTARY, **QWEN3_VL),
    "qwen3_vl_moe": Variant(
        "qwen3_vl_moe",
        text=GROUPED
        | ROTARY
        | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
        **QWEN3_VL,
    ),
    "paligemma": Variant(
        "paligemma",
        text=GEMMA | {"model_type": "gemma"},
        vision=SIGLIP,
        processor="PaliGemmaProcessor",
        image_processor="SiglipImageProcessor",
        image_settings={"size": SQUARE, "image_seq_length": PLACES},
        options={"image_token_index": "<image>", "projection_dim": WIDTH},
        specials=("<bos>", "<eos>", "<pad>"),
        tokens=("<image>",),
    ),
    "gemma3": Variant(
        "gemma3",
        text=GEMMA | {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
        vision=SIGLIP,
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessor",
        image_settings={"size": SQUARE},
        options={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "mm_tokens_per_image": PLACES // 4,
        },
        processor_options={"image_seq_length": PLACES // 4},
        specials=("<bos>", "<eos>", "<pad>"),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        tokens=("<start_of_turn>", "<end_of_turn>"),
        adds="bos",
        template=("<bos>", "<start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n"),
    ),
    "internvl": Variant(
        "internvl",
        text=QWEN2,
        vision=EYES | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessor",
        image_settings={"size": SQUARE, "crop_to_patches": True, "max_patches": 2},
        video_processor="InternVLVideoProcessor",
        options={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": PLACES // 4, "tie_word_embeddings": False},
        processor_options={"image_seq_length": PLACES // 4},
        specials=("<|endoftext|>", "<|im_end|>", "<|pad|>"),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        tokens=("<|im_start|>",),
        template=("", CHATML[1], "<IMG_CONTEXT>\n", *CHATML[3:]),
    ),
    "idefics3": Variant(
        "idefics3",
        **IDEFICS,
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"),
        tokens=IDEFICS_MARKS,
        adds="bos",
        template=("<|begin_of_text|>", *IDEFICS_TURNS),
    ),
    "smolvlm": Variant(
        "smolvlm",
        **IDEFICS
        # SmolVLM's own processor wants num2words, for videos; its first release used that of Idefics3.
        | (
            {"processor": "SmolVLMProcessor", "video_processor": "SmolVLMVideoProcessor"}
            if find_spec("num2words")
            else {}
        ),
        specials=("<|im_start|>", "<|im_end|>", "<|pad|>"),
        tokens=(*IDEFICS_MARKS, "<video>"),
        template=("<|im_start|>", *IDEFICS_TURNS),
    ),
    "instructblip_vicuna": Variant(
        "instructblip", **BLIP, text=LLAMA, processor="InstructBlipProcessor", adds="bos", qformer_tokenizer=True
    ),
    "instructblip_t5": Variant(
        "instructblip", **BLIP, **T5_TOKENS, text=FLAN_T5, processor="InstructBlipProcessor", qformer_tokenizer=True
    ),
    "blip2_opt": Variant("blip-2", **BLIP, **OPT_TOKENS, text=OPT, processor="Blip2Processor"),
    "blip2_t5": Variant("blip-2", **BLIP, **T5_TOKENS, text=FLAN_T5, processor="Blip2Processor"),
    "mllama": Variant(
        "mllama",
        text=GROUPED | {"cross_attention_layers": [1]},
        vision={
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_global_layers": 1,
            "attention_heads": HEADS,
            "intermediate_size": 40,
            "vision_output_dim": 2 * WIDTH,
            "intermediate_layers_indices": [0],
            "image_size": SIDE,
            "patch_size": PATCH,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        processor="MllamaProcessor",
        image_processor="MllamaImageProcessor",
        image_settings={"size": SQUARE, "max_image_tiles": 2},
        options={"image_token_index": "<|image|>"},
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"),
        tokens=("<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        beyond=("<|image|>",),
        adds="bos",
        template=(
            "<|begin_of_text|>",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|image|>",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ),
}
