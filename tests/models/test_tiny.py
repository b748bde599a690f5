"""The tiny checkpoints load, see, write, and are the same at every build."""

import hashlib

import pytest

from mmray.models.tiny.checkpoints import SENTENCES, build
from mmray.models.tiny.variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_sees_an_image_and_writes_three_tokens(loaded, variant):
    model = loaded(variant)
    logits = model.network(**model.inputs).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    inputs = {name: value for name, value in model.inputs.items() if name != "decoder_input_ids"}
    written = model.network.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # A decoder-only model gives its prompt back, an encoder-decoder its start token.
    before = 1 if "decoder_input_ids" in model.inputs else inputs["input_ids"].shape[1]
    assert written.shape[1] == before + 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_changes_the_answer(loaded, variant):
    model = loaded(variant)
    other = model.inputs | {"pixel_values": model.inputs["pixel_values"].flip(-1) * 0.5}
    assert (model.network(**model.inputs).logits[:, -1] - model.network(**other).logits[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer_keeps_every_text(loaded, variant):
    tokenizer = loaded(variant).processor.tokenizer
    for sentence in (*SENTENCES, "Ein Hund läuft — 犬 🐕"):
        ids = tokenizer(sentence, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == sentence
    assert len(tokenizer) < 1600


def test_same_bytes_at_every_build(tiny, tmp_path):
    for variant in ("llava", "qwen3_vl_moe", "instructblip_t5"):
        again = build(variant, tmp_path / variant)
        first, second = (_digests(folder) for folder in (tiny(variant), again))
        assert first == second
        assert "model.safetensors" in first


def _digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
