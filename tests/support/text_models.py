"""Text-only models: the tiny checkpoints as fixtures, one that has learned four languages, and a corpus."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Not torch: every process of pytest imports this, and those that only hand out tests need none.
LEARNER = {"hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 128}
"""What the model that learns the corpus has larger than the tiny Llama."""

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
        from mmray.models.tiny.texts import build

        return shared(f"text {family}", train if family == "learner" else lambda folder: build(family, folder))

    return cache(make)


@pytest.fixture(scope="session")
def open_text_model(text_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a family's model as `mmray.load_model` gives it; shared by all tests: leave it as it was."""
    from mmray.neurons.model import load_model

    return cache(lambda family: load_model(str(text_model(family))))


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
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from mmray.models.tiny.texts import FAMILIES, SPECIALS, network_of

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
    model = network_of("llama", FAMILIES["llama"] | LEARNER, len(tokenizer)).train()
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
