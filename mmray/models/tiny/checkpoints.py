"""Tiny checkpoints of the table's families, complete: configuration, random weights, tokenizer and processor.

`build("qwen2_vl", folder)` writes what `AutoProcessor` and `AutoModelForImageTextToText` load without a network.
Each imitates the habits of its family that a caller can trip over: who adds the beginning-of-sequence token, where
the image's placeholders stand, on which side a batch is padded, which prompts end in a special token.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mmray.models.tiny.pieces import Variant
from mmray.models.tiny.variants import VARIANTS

SENTENCES = (
    "An image of a dog and a cat.",
    "A photo of a red ball on a chair beside the tree.",
    "A boy and a girl ride a horse near the water.",
    "Describe the image in few words.",
    "What is in the picture? Two birds and a fish in the sea.",
    "The man with a hat and the woman with a cup sit at the table in front of a house.",
)


def build(variant: str, folder: Path) -> Path:
    """Write the variant's checkpoint into the folder, the same bytes at every call, and return the folder."""
    facts = VARIANTS[variant]
    tokenizer = tokenizer_of(facts)
    settings: dict[str, Any] = dict(facts.processor_options)
    if facts.video_processor:
        settings["video_processor"] = getattr(transformers, facts.video_processor)()
    if facts.qformer_tokenizer:
        settings["qformer_tokenizer"] = tokenizer_of(facts)
    if facts.template:
        settings["chat_template"] = template_of(*facts.template)
    image_processor = getattr(transformers, facts.image_processor)(**facts.image_settings)
    processor = getattr(transformers, facts.processor)(image_processor=image_processor, tokenizer=tokenizer, **settings)
    processor.save_pretrained(folder)
    # The processor may have added tokens, PaliGemma's more than a thousand, so the vocabulary is counted after it.
    _model(variant, tokenizer).save_pretrained(folder)
    return folder


def tokenizer_of(facts: Variant) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on a few captions: every text can be encoded, and common words are one token."""
    specials = list(dict.fromkeys((*facts.specials, *facts.named.values(), *facts.tokens)))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + len(alphabet) + 80,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    bos, eos, pad = facts.specials
    if facts.adds:
        single = {"bos": f"{bos} $A", "eos": f"$A {eos}", "both": f"{bos} $A {eos}"}[facts.adds]
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side=facts.padding_side,
        extra_special_tokens=dict(facts.named),
        model_max_length=512,
    )
    tokenizer.add_tokens(list(facts.beyond), special_tokens=True)
    return tokenizer


def template_of(start: str, user: str, image: str, closing: str, assistant: str) -> str:
    """Return a chat template in Jinja for messages whose content is a list of texts and images."""
    start, user, image, closing, assistant = (json.dumps(text) for text in (start, user, image, closing, assistant))
    return (
        f"{{{{ {start} }}}}{{% for message in messages %}}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {assistant} }}}}{{% else %}}{{{{ {user} }}}}{{% endif %}}"
        f"{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{{{{ {image} }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{{{ {closing} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
    )


def _model(variant: str, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    """Make the model with seeded random weights, large enough that activations do not vanish."""
    facts = VARIANTS[variant]
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = dict(zip(roles, tokenizer.convert_tokens_to_ids(list(facts.specials)), strict=True))
    vocabulary = {"vocab_size": len(tokenizer) - len(facts.beyond)}
    options = _with_ids(facts.options, tokenizer)
    if "qformer_config" in options:
        options["qformer_config"] = options["qformer_config"] | vocabulary
    config = transformers.AutoConfig.for_model(
        facts.config,
        text_config=_with_ids(facts.text, tokenizer) | ids | vocabulary,
        vision_config=dict(facts.vision),
        **options,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomise(model, variant)
    model.generation_config.update(**ids)
    return model.eval()


@torch.no_grad()
def randomise(model: transformers.PreTrainedModel, seed: str) -> None:
    """Give a model seeded random weights, large enough that activations do not vanish."""
    random = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        # Gains stay near one. All else, also the biases and gates that start at zero, is given some weight.
        is_gain = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.copy_(1 + 0.1 * noise if is_gain else 0.2 * noise)


def _with_ids(settings: Mapping[str, Any], tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    """Copy the settings, with ids for the special tokens that they name."""
    return {
        name: tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) and value.startswith("<") else value
        for name, value in settings.items()
    }
