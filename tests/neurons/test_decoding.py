"""What a neuron writes is, token by token, its row times the unembedding."""

import pytest
import torch

from mmray.models.generation import token_text
from mmray.models.parts import output_rows, unembedding_rows
from mmray.neurons import decoding
from mmray.neurons.decoding import DECODED, decode_neurons
from mmray.tables import PART_SCHEMAS


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe", "blip2_opt", "gemma3", "mllama", "blip2_t5"])
def test_tokens_are_the_ends_of_the_projection(open_model, monkeypatch, variant, folded):
    model = open_model(variant)
    # Neurons are decoded in many blocks, the last of them smaller.
    monkeypatch.setattr(decoding, "CHUNK", 7 * len(model.tokenizer))
    table = decode_neurons(model, fold_norm=folded)
    assert table.schema.equals(PART_SCHEMAS["decoded"])
    unembedding = unembedding_rows(model.network, model.parts).double()
    count = min(len(model.tokenizer), len(unembedding))
    expected = []
    for projection in model.projections:
        for row in output_rows(model.network, projection):
            # Either sign of the row, made long, is what the norm sees; half the difference takes a bias away.
            written = row
            if folded:
                centred = row - row.mean() if isinstance(model.norm, torch.nn.LayerNorm) else row
                size = centred.square().mean().sqrt()
                written = (model.norm(1e4 * row) - model.norm(-1e4 * row)) / 2 * size
            expected.append(unembedding[:count] @ written.double())
    assert len(table) == len(expected) == sum(model.widths)
    texts = [token_text(model, token) for token in range(count)]
    for row, logits in zip(table.to_pylist(), expected, strict=True):
        for column, sign in (("tokens", 1), ("suppressed", -1)):
            best = (sign * logits).topk(DECODED + 1)
            gaps = best.values[:-1] - best.values[1:]
            named = [texts[token] for token in best.indices.tolist()[:DECODED]]
            # Where two tokens are nearly even, fp32 may order them otherwise.
            if float(gaps.min()) > 1e-4 * float(best.values[0]):
                assert row[column] == named
            else:
                assert len(set(row[column]) & set(named)) >= len(set(named)) - 1


def test_the_demo_s_neurons_write_words(open_model):
    model = open_model("demo")
    table = decode_neurons(model, fold_norm=False)
    assert len(table) == sum(model.widths)
    rows = output_rows(model.network, model.projections[7])
    logits = unembedding_rows(model.network, model.parts)[: len(model.tokenizer)] @ rows[89]
    named = table["tokens"][7 * 1024 + 89].as_py()
    assert [token_text(model, token) for token in logits.topk(10).indices.tolist()] == named
