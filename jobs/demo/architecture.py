"""The demo model before training: tokenizer, processor and random weights.

image, 96 x 96 pixels ─► CLIP tower, 6 layers x 192 ─► projector ─► 64 image tokens ─┐
                                                                                     ├─► LLaMA decoder, 8 x 256
question, answer      ─► tokenizer ─► embedding      ─────────────► word tokens ─────┘
"""

from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from jobs.demo.captions import question_without_image, training_exchange
from jobs.demo.scenes import SIZE, load_concepts, sample_scene

PATCH: int = 12
"""Side of an image token's patch, in pixels."""

IMAGE_TOKENS: int = (SIZE // PATCH) ** 2
"""Image tokens per image, in row-major order."""

CHAT_TEMPLATE: str = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def chat_prompt(question: str, *, with_image: bool) -> str:
    """Return `CHAT_TEMPLATE` filled with one question, up to where the answer begins."""
    image = "<image>\n" if with_image else ""
    return f"USER: {image}{question} ASSISTANT:"


def train_tokenizer(scene_count: int, seed: int = 1) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer on texts about scenes; with more scenes, fewer words are split."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-()"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(scene_count, Random(seed)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        # For generation in batches; training pads on the right by itself.
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts(scene_count: int, random: Random) -> Iterator[str]:
    for scene in [sample_scene(random) for _ in range(scene_count)]:
        exchange = training_exchange(scene, random, noisy=False)
        yield f"{chat_prompt(exchange.question, with_image=True)} {exchange.answer}"
        exchange = question_without_image(random)
        yield f"{chat_prompt(exchange.question, with_image=False)} {exchange.answer}"
    # Repeated, so that rare names are frequent enough to become tokens.
    for concept in load_concepts().values():
        for name in concept.names.values():
            yield from [name] * 30


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor to save with the model: chat template, tokenizer and image normalisation."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return an untrained model of 12.5 million parameters and 8 x 1,024 neurons, with an untied unembedding."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=IMAGE_TOKENS,
            # Untied, as in LLaVA: neurons are scored against rows of the unembedding.
            tie_word_embeddings=False,
        )
    )
