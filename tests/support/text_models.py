"""Text-only models: a tiny random checkpoint of each family, one that has learned four languages, and a corpus."""

import json
import random
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.pieces import HEADS, LAYERS, WIDTH
from tests.support.tiny import tokenizer_of

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
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "phi3": "Phi-3",
    "gpt2": "GPT-2",
    "bloom": "BLOOM",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX",
    "olmo2": "OLMo 2",
    "mixtral": "Mixtral",
    "gpt_oss": "GPT-OSS",
    "falcon": "Falcon",
}
"""Model type → the family as people know it."""
LEARNER = FAMILIES["llama"] | {"hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 128}
SPECIALS = ("<s>", "</s>", "<pad>")

WORDS = {
    "en": ("the", "sees", "and", ("dog", "cat", "horse", "bird"), ("runs home", "sleeps here", "eats bread")),
    "de": ("dort", "sieht", "und", ("Hund", "Katze", "Pferd", "Vogel"), ("läuft heim", "schläft hier", "frisst Brot")),
    "fr": ("voici", "voit", "et", ("chien", "chat", "cheval", "oiseau"), ("court ici", "dort bien", "mange du pain")),
    "es": ("este", "mira", "y", ("perro", "gato", "caballo", "pájaro"), ("corre mucho", "duerme", "come pan")),
}
"""Language → article, verb, conjunction, nouns, endings."""


@pytest.fixture(scope="session")
def text_model(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """Return the checkpoint folder of a family, or of the `learner` that knows the corpus's languages."""

    def make(family: str) -> Path:
        return shared(f"text {family}", train if family == "learner" else lambda folder: build(family, folder))

    return cache(make)


@pytest.fixture(scope="session")
def open_text_model(text_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a family's model as `mmray.load_model` gives it; shared by all tests: leave it as it was."""
    from mmray.neurons.model import load_model

    return cache(lambda family: load_model(str(text_model(family))))


def build(family: str, folder: Path) -> Path:
    """Write a family's checkpoint with seeded random weights, and return the folder."""
    facts: Any = SimpleNamespace(specials=SPECIALS, named={}, tokens=(), beyond=(), padding_side="left")
    # Llama's tokenizer begins a text itself; GPT-2's does not.
    facts.adds = "bos" if family in ("llama", "mistral", "gemma2") else ""
    tokenizer = tokenizer_of(facts)
    model = _model(family, FAMILIES.get(family) or PROBED[family], len(tokenizer))
    seeded = torch.Generator().manual_seed(zlib.crc32(family.encode()))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=seeded)
            gain = weight.dim() == 1 and bool((weight == 1).all())
            weight.copy_(1 + 0.1 * noise if gain else 0.2 * noise)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def sentences(language: str, count: int, seed: int = 0) -> list[str]:
    """Return sentences of a language: `the dog sees the cat and runs home`."""
    rng = random.Random(f"{language} {seed}")
    article, verb, conjunction, nouns, endings = WORDS[language]
    found = []
    for _ in range(count):
        first = rng.randrange(len(nouns))
        # The second noun follows from the first, so that a model can learn what to say.
        second = nouns[(first + 1) % len(nouns)]
        found.append(f"{article} {nouns[first]} {verb} {article} {second} {conjunction} {rng.choice(endings)}")
    return found


def corpus(file: Path, texts: int = 24, longest: int = 12, letters: int | None = None) -> Path:
    """Write `texts` texts of every language as JSON lines; every third has `longest` sentences, others two.

    With `letters`, texts end after so many.
    """
    rows = []
    for language in WORDS:
        for number in range(texts):
            text = " . ".join(sentences(language, longest if number % 3 == 0 else 2, number))
            rows.append({"id": f"{language}{number}", "text": text[:letters], "language": language})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def train(folder: Path, steps: int = 140) -> Path:
    """Write a checkpoint that has learned the corpus's sentences, with one token per word, and return the folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [" . ".join(sentences(language, 4, seed)) for language in WORDS for seed in range(100, 132)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    )
    bos, eos, pad = SPECIALS
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )
    torch.manual_seed(0)
    model = _model("llama", LEARNER, len(tokenizer)).train()
    rows = [[0, *tokenizer(text)["input_ids"]] for text in texts]
    ids = torch.tensor([row + [2] * (max(map(len, rows)) - len(row)) for row in rows])
    labels = ids.masked_fill(ids == 2, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(step))[:16]
        loss = model(input_ids=ids[some], attention_mask=(ids[some] != 2).long(), labels=labels[some]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return folder


def _model(family: str, settings: dict[str, Any], vocabulary: int) -> Any:
    config = transformers.AutoConfig.for_model(
        family, **settings, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
