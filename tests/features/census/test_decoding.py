"""What a neuron writes is, token by token, its row times the unembedding."""

import copy
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from mmray.features.census import decoding
from mmray.features.census.decoding import DECODED, decode_neurons
from mmray.features.census.merging import RunMerge
from mmray.features.census.tables import PARTS
from mmray.features.census.written_tokens import written_tokens
from mmray.models.generation import token_text
from mmray.models.loading import load
from mmray.models.parts import output_rows, unembedding_rows
from tests.support.samples import analyse, samples


def normed(norm, row):
    """What a norm makes of a row but for its size: either sign of it, made long, and half the difference."""
    centred = row - row.mean() if isinstance(norm, torch.nn.LayerNorm) else row
    return (norm(1e4 * row) - norm(-1e4 * row)) / 2 * centred.square().mean().sqrt()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe", "blip2_opt", "gemma3", "mllama", "blip2_t5"])
def test_tokens_are_the_ends_of_the_projection(open_model, monkeypatch, variant, folded):
    model = open_model(variant)
    # Neurons are decoded in many blocks, the last of them smaller.
    monkeypatch.setattr(decoding, "CHUNK", 7 * len(model.tokenizer))
    table = decode_neurons(model, fold_norm=folded)
    assert table.schema.equals(PARTS["decoded"])
    unembedding = unembedding_rows(model.network, model.parts).double()
    count = min(len(model.tokenizer), len(unembedding))
    expected = []
    for projection in model.projections:
        for row in output_rows(model.network, projection):
            written = row
            if folded:
                if projection.post_norm:
                    written = normed(model.network.get_submodule(projection.post_norm), written)
                written = normed(model.norm, projection.scale * written)
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


def test_a_neuron_writes_by_negative_activation_what_it_suppresses():
    decoded = pa.table({"tokens": [["a"], ["b"], ["c"]], "suppressed": [["x"], ["y"], []]})
    found = written_tokens(decoded, [2, 0, 0, 1, 2], [1.0, -0.5, 0.0, -2.0, -1.0])
    assert found.to_pylist() == [["c"], ["x"], ["a"], ["y"], []]
    assert written_tokens(decoded, [], []).to_pylist() == []


def test_tokens_of_a_ranking_are_what_activation_times_row_raises_most(open_model):
    model = open_model("llava")
    merge = RunMerge(model.widths, decode_neurons(model, fold_norm=False), 5)
    merge.add(analyse(model, samples(8)).__getitem__)
    ranked = [row for table, _ in merge.rankings.tables() for row in table.to_pylist()]
    unembedding = unembedding_rows(model.network, model.parts)[: len(model.tokenizer)].double()
    negative = 0
    for row in ranked:
        logits = unembedding @ (
            row["activation"] * output_rows(model.network, model.projections[row["layer"]])[row["unit"]].double()
        )
        best = logits.topk(DECODED)
        assert token_text(model, int(best.indices[0])) == row["tokens"][0]
        assert len({token_text(model, token) for token in best.indices.tolist()} - set(row["tokens"])) <= 1
        negative += row["activation"] < 0
    assert 0.2 < negative / len(ranked) < 0.8


def test_half_precision_decodes_as_its_numbers_do(tiny):
    half = load(str(tiny("llava")), "bf16", "cpu")
    whole = replace(half, network=copy.deepcopy(half.network).float())
    for folded in (False, True):
        assert decode_neurons(half, fold_norm=folded) == decode_neurons(whole, fold_norm=folded)


def test_a_block_s_negative_weight_turns_what_its_neurons_write_round(open_model):
    model = open_model("mllama")
    turned = [replace(projection, scale=-projection.scale) for projection in model.projections]
    other = replace(model, parts=replace(model.parts, projections=(*turned, *model.parts.of("vision"))))
    plain, after = (decode_neurons(given, fold_norm=True) for given in (model, other))
    assert after["tokens"] == plain["suppressed"]
    assert decode_neurons(other, fold_norm=False) == decode_neurons(model, fold_norm=False)
