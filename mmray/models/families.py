"""The layout of each architecture, as data: where decoder, vision tower and projector keep their MLPs.

A vision-language model combines three parts that vary independently, so there are three tables. A text-only model is a
family without a tower, and its own decoder.

    FAMILIES[config.model_type]               where the parts hang, and how the image enters
    DECODERS[config.text_config.model_type]   what a block of the language decoder looks like
    TOWERS[config.vision_config.model_type]   what a block of the vision tower looks like

Two more are for models that the probe reads as well: HABITS, for prompts and images, and TILED.

    LlavaForConditionalGeneration             (family "llava", decoder "llama", tower "clip_vision_model")
    ├── model
    │   ├── vision_tower                      Family.tower
    │   │   └── encoder.layers.N              Stack.blocks
    │   │       └── mlp.fc2                   Stack.projection
    │   ├── multi_modal_projector             Family.projectors: a Stack of one block
    │   │   └── linear_2
    │   └── language_model                    Family.decoder
    │       ├── layers.N                      Stack.blocks
    │       │   └── mlp                       gate_proj: Stack.gate, down_proj: Stack.projection
    │       └── norm                          Decoder.final_norm
    └── lm_head                               Family.unembedding

Paths are those of transformers 5. Where versions or variants differ, a tuple holds the alternatives, and the first that
exists is taken. A row says where to look; `mmray.models.parts` checks what is there.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Stack:
    """A list of blocks with one MLP each, or a single module that is one MLP."""

    blocks: tuple[str, ...]
    """Path of the list, or of the single module, below the part."""
    projection: tuple[str, ...]
    """Path below a block of the output projection: a Linear or a module of fused experts."""
    gate: tuple[str, ...] = ()
    """Path below a block of the gate's Linear; if none exists, the MLP is plain."""
    post_norm: str | None = None
    """Path below a block of a norm on the MLP's output, before it is added to the residual stream."""
    residual_gate: str | None = None
    """Path below a block of a number whose tanh multiplies the MLP's output; not all blocks need have it."""
    ends_block: bool = True
    """False if the block goes on after its MLP."""
    reads_text: bool = False
    """The question goes through these blocks, not the image."""
    optional: bool = False
    """Some checkpoints of the family lack the part."""


@dataclass(frozen=True)
class Decoder:
    """The language decoder of one text model type."""

    stack: Stack
    final_norm: str = "norm"
    """Path below the decoder of the norm before the unembedding."""
    encoder_decoder: bool = False
    """The prompt goes through an encoder; the decoder's sequence is only the caption."""
    streams: bool = False
    """Blocks pass on several streams, as `mmray.models.streams` says."""


@dataclass(frozen=True)
class Family:
    """Where one multi-modal model type keeps its parts."""

    decoder: tuple[str, ...]
    """Path of the language decoder."""
    unembedding: str
    tower: str = ""
    """Path of the vision tower."""
    projectors: tuple[Stack, ...] = ()
    """The MLPs between tower and decoder, by their paths from the top; none if the bridge is one Linear."""
    image: str = "tokens"
    """`tokens`: placeholders in the sequence become the image; `cross-attention`: decoder blocks attend to it; `none`:
    the model reads text only."""


GATED = Stack(blocks=("layers",), projection=("mlp.down_proj",), gate=("mlp.gate_proj",))
# One Linear computes the gates and the other factors.
GATED_FUSED = Stack(blocks=("layers",), projection=("mlp.down_proj",), gate=("mlp.gate_up_proj",))
# Gemma 2 and 3 normalise the MLP's output before they add it to the residual stream.
GATED_POST_NORM = Stack(
    blocks=("layers",), projection=("mlp.down_proj",), gate=("mlp.gate_proj",), post_norm="post_feedforward_layernorm"
)

DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3"), Decoder(GATED)),
    **dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text"), Decoder(GATED)),
    **dict.fromkeys(("gemma2", "gemma3_text"), Decoder(GATED_POST_NORM)),
    "gemma3n_text": Decoder(replace(GATED_POST_NORM, ends_block=False), streams=True),
    "phi3": Decoder(GATED_FUSED),
    "gpt2": Decoder(Stack(blocks=("h",), projection=("mlp.c_proj",)), final_norm="ln_f"),
    "bloom": Decoder(Stack(blocks=("h",), projection=("mlp.dense_4h_to_h",)), final_norm="ln_f"),
    "gpt_neox": Decoder(Stack(blocks=("layers",), projection=("mlp.dense_4h_to_h",)), final_norm="final_layer_norm"),
    # Blocks listed in mlp_only_layers hold an ordinary MLP instead of experts.
    "qwen3_vl_moe_text": Decoder(
        Stack(blocks=("layers",), projection=("mlp.experts", "mlp.down_proj"), gate=("mlp.gate_proj",))
    ),
    # Cross-attention blocks are in the same list, and multiply their MLP's output by the tanh of a learnt gate.
    "mllama_text_model": Decoder(
        Stack(
            blocks=("layers",),
            projection=("mlp.down_proj",),
            gate=("mlp.gate_proj",),
            residual_gate="cross_attn_mlp_gate",
        )
    ),
    # OPT flattens batch and position before its MLP: fc2 sees (batch * position, neuron).
    "opt": Decoder(Stack(blocks=("decoder.layers",), projection=("fc2",)), final_norm="decoder.final_layer_norm"),
    # A block of T5's decoder is self-attention, cross-attention, MLP; gated in Flan-T5, plain in the first T5.
    "t5": Decoder(
        Stack(
            blocks=("decoder.block",),
            projection=("layer.2.DenseReluDense.wo",),
            gate=("layer.2.DenseReluDense.wi_0",),
        ),
        final_norm="decoder.final_layer_norm",
        encoder_decoder=True,
    ),
}

PLAIN_TOWER = (Stack(blocks=("encoder.layers", "vision_model.encoder.layers"), projection=("mlp.fc2",)),)

TOWERS: dict[str, tuple[Stack, ...]] = {
    **dict.fromkeys(("blip_2_vision_model", "instructblip_vision_model"), PLAIN_TOWER),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), PLAIN_TOWER),
    # Older checkpoints of Idefics3 and SmolVLM name the tower like the family.
    **dict.fromkeys(("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision"), PLAIN_TOWER),
    "internvl_vision": (Stack(blocks=("encoder.layer",), projection=("mlp.fc2",)),),
    # The cropped image goes through the first list, its tiles together through the second.
    "mllama_vision_model": (
        Stack(blocks=("transformer.layers",), projection=("mlp.fc2",)),
        Stack(blocks=("global_transformer.layers",), projection=("mlp.fc2",)),
    ),
    "pixtral": (
        Stack(blocks=("transformer.layers",), projection=("feed_forward.down_proj",), gate=("feed_forward.gate_proj",)),
    ),
    "qwen2_vl_vision": (Stack(blocks=("blocks",), projection=("mlp.fc2",)),),
    "qwen2_5_vl_vision": (Stack(blocks=("blocks",), projection=("mlp.down_proj",), gate=("mlp.gate_proj",)),),
    "qwen3_vl_vision": (Stack(blocks=("blocks",), projection=("mlp.linear_fc2",)),),
    "qwen3_vl_moe_vision": (Stack(blocks=("blocks",), projection=("mlp.linear_fc2",)),),
}


@dataclass(frozen=True)
class Habits:
    """How a type's processor and decoder treat prompt, image and caption, where they differ from the others'."""

    adds_placeholder: bool = False
    """The processor writes the image's placeholder before the text, so the prompt must not."""
    prompt_end: str = ""
    """What the processor appends to the prompt."""
    caption_type: int = 0
    """The caption's `token_type_ids`."""
    sees_later: str = ""
    """What sees later tokens of itself too: each `image`, or all of the `prompt`."""
    first_position: int = 0
    """Where positions are counted from."""
    rewrites_prompt: bool = False
    """Generation puts the text model's start token in place of the prompt's first token, and drops its last."""
    newlines: bool = False
    """The image's tokens are those of the downscaled image, then of the large one with a token after each row."""


HABITS: dict[str, Habits] = {
    **dict.fromkeys(("blip-2", "florence2", "instructblip", "kosmos-2", "kosmos-2.5"), Habits(adds_placeholder=True)),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), Habits(newlines=True)),
    "blip": Habits(rewrites_prompt=True),
    "gemma3": Habits(sees_later="image"),
    # Of its token types, 0 is the prompt, which is read in both directions: a caption of type 0 would leak.
    "paligemma": Habits(prompt_end="\n", caption_type=1, sees_later="prompt", first_position=1),
}
"""By `config.model_type`; the others have none of these."""


def habits_of(config: Any) -> Habits:
    """Return the habits of a configuration's type."""
    return HABITS.get(config.model_type, Habits())


TILED = {"mllama_vision_model": "aspect_ratio_mask"}
"""Towers that also run padding (missing tiles, rows after a tile's patches) → the input that masks tiles."""

LLAVA = Family(
    decoder=("model.language_model",),
    unembedding="lm_head",
    tower="model.vision_tower",
    projectors=(Stack(blocks=("model.multi_modal_projector",), projection=("linear_2",)),),
)
QWEN2_VL = Family(
    decoder=("model.language_model",),
    unembedding="lm_head",
    tower="model.visual",
    projectors=(Stack(blocks=("model.visual.merger",), projection=("mlp.2",)),),
)
QWEN3_VL = Family(
    decoder=("model.language_model",),
    unembedding="lm_head",
    tower="model.visual",
    projectors=(
        Stack(blocks=("model.visual.merger",), projection=("linear_fc2",)),
        # Deepstack: features of earlier tower blocks, added to the first blocks of the decoder.
        Stack(blocks=("model.visual.deepstack_merger_list",), projection=("linear_fc2",), optional=True),
    ),
)
GEMMA = Family(decoder=("model.language_model",), unembedding="lm_head", tower="model.vision_tower")
IDEFICS = Family(decoder=("model.text_model",), unembedding="lm_head", tower="model.vision_model")
TEXT = Family(decoder=("model",), unembedding="lm_head", image="none")
GPT2 = Family(decoder=("transformer",), unembedding="lm_head", image="none")
# The Q-Former is the bridge: its query branch carries the image, its text branch (InstructBLIP) the instruction.
QUERY_BRANCH = Stack(blocks=("qformer.encoder.layer",), projection=("output_query.dense",))
QUESTION_BRANCH = Stack(blocks=("qformer.encoder.layer",), projection=("output.dense",), reads_text=True)
QUESTION_MASK = "qformer_attention_mask"
"""Input that is 1 at the question's positions in that branch."""

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("internvl", "llava", "llava_next", "llava_onevision", "vipllava"), LLAVA),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), QWEN2_VL),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), QWEN3_VL),
    **dict.fromkeys(("gemma3", "gemma3n", "paligemma"), GEMMA),
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS),
    # A causal decoder (OPT, Vicuna) is the `model` below its own head; T5 is the whole `language_model`.
    "blip-2": Family(
        decoder=("language_model.model", "language_model"),
        unembedding="language_model.lm_head",
        tower="vision_model",
        projectors=(QUERY_BRANCH,),
    ),
    "instructblip": Family(
        decoder=("language_model.model", "language_model"),
        unembedding="language_model.lm_head",
        tower="vision_model",
        projectors=(QUERY_BRANCH, QUESTION_BRANCH),
    ),
    "mllama": Family(
        decoder=("model.language_model",),
        unembedding="lm_head",
        tower="model.vision_model",
        image="cross-attention",
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma3n_text", "llama", "mistral"), TEXT),
    **dict.fromkeys(("opt", "phi3", "qwen2", "qwen3"), TEXT),
    **dict.fromkeys(("bloom", "gpt2"), GPT2),
    "gpt_neox": Family(decoder=("gpt_neox",), unembedding="lm_head", image="none"),
}
