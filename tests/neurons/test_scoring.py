"""Contributions add up to what the MLP writes, hooks change nothing, and the batch does not matter."""

import pytest
import torch

from mmray.models.capture import capture_input
from mmray.models.norms import fold_norm
from mmray.models.parts import unembedding_rows
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import find_forms
from mmray.neurons.scoring import score_batch, whole_nouns
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import locate_mentions
from tests.support.samples import (
    CAPTIONS,
    NOUNS,
    analyse,
    batch_of,
    demo_samples,
    hooks,
    outputs_of,
    picture,
    png,
    sample,
)

TEXTS = (CAPTIONS[0], CAPTIONS[3], CAPTIONS[2])


def written(model, projection, output):
    """What the neurons of a projection wrote of its output: all but a bias."""
    bias = getattr(model.network.get_submodule(projection.path), "bias", None)
    return output.double() if bias is None else output.double() - bias.double()


def columns(model, places):
    return unembedding_rows(model.network, model.parts)[[place.token for place in places]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_contributions_add_up_to_what_the_mlp_writes(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    assert len(places) == 6
    with outputs_of(model, [projection.path for projection in model.projections]) as outputs:
        scored = score_batch(model, batch, places)
    rows = [place.row * batch.positions + place.position for place in places]
    for layer, projection in enumerate(model.projections):
        output = written(model, projection, outputs[projection.path][0])[rows]
        expected = (output * columns(model, places).double()).sum(1)
        error = (scored.scores[layer].double().sum(1) - expected).abs()
        assert (error <= 1e-6 * scored.scores[layer].double().abs().sum(1)).all()
        assert expected.abs().min() > 1e-4


def test_contributions_of_the_demo_add_up_to_what_the_mlp_writes(open_model):
    model = open_model("demo")
    found, _ = demo_samples(48)
    sample = next(sample for sample in found if sample.language == "en" and len(sample.objects) == 2)
    noun = sample.objects[1]
    with outputs_of(model, [projection.path for projection in model.projections]) as outputs:
        contributions = model.contributions(sample.image, sample.caption, noun)
    before = sample.caption[: sample.caption.index(noun)]
    tokens = model.tokenizer(f"{before}{noun}", add_special_tokens=False).input_ids
    place = len(tokens) - len(model.tokenizer(f" {noun}", add_special_tokens=False).input_ids)
    column = unembedding_rows(model.network, model.parts)[tokens[place]].double()
    whole = model.tokenizer(sample.caption, add_special_tokens=False).input_ids
    for layer, projection in enumerate(model.projections):
        # The caption ends the sequence, so that places count from its end.
        output = outputs[projection.path][0][place - 1 - len(whole)].double()
        assert float(contributions[layer].double().sum()) == pytest.approx(float(output @ column), rel=1e-5)
    assert contributions.shape == (8, 1024)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_state_is_the_logit(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    rows = [place.row * batch.positions + place.position for place in places]
    states = []
    with torch.inference_mode(), capture_input(model.norm, states.append):
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits.flatten(0, 1)[rows]
    states = states[0].flatten(0, 1)[rows]
    unembedding = columns(model, places)
    folded = fold_norm(model, states, unembedding)
    bias = getattr(model.norm, "bias", None)
    constant = 0 if bias is None else unembedding @ bias
    chosen = logits[range(len(places)), [place.token for place in places]]
    torch.testing.assert_close((states * folded).sum(1) + constant, chosen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_contributions_add_up_to_the_block_s_share_of_the_logit(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    rows = [place.row * batch.positions + place.position for place in places]
    norms = [projection.post_norm for projection in model.projections if projection.post_norm]
    states = []
    with (
        outputs_of(model, [*(projection.path for projection in model.projections), *norms]) as outputs,
        capture_input(model.norm, states.append),
    ):
        scored = score_batch(model, batch, places, folded=True)
    folded = fold_norm(model, states[0].flatten(0, 1)[rows], columns(model, places)).double()
    for layer, projection in enumerate(model.projections):
        if projection.post_norm:
            added = outputs[projection.post_norm][0].double()
        else:
            added = written(model, projection, outputs[projection.path][0]) * projection.scale
        expected = (added[rows] * folded).sum(1)
        torch.testing.assert_close(scored.scores[layer].double().sum(1), expected, rtol=1e-4, atol=1e-5)
    assert bool(norms) == (variant == "gemma3")


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_leave_every_bit_of_the_logits(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    inputs = batch.to(model.device, model.network.dtype)
    logits = []
    before, network = hooks(model.network), model.network
    handle = network.get_submodule(model.parts.unembedding).register_forward_hook(lambda *call: logits.append(call[2]))
    statistics = TokenStatistics(model.widths)
    statistics.begin([{}] * len(TEXTS), batch.spans)
    try:
        with torch.inference_mode():
            forward(model, batch)
        for folded in (False, True):
            score_batch(model, batch, places, folded=folded, statistics=statistics if folded else None)
        # Each score takes the unembedding's product a second time, for the token's probability.
        plain, seen = logits[0], logits[1::2]
    finally:
        handle.remove()
    statistics.commit()
    assert len(seen) == 2
    assert all(torch.equal(plain, other) for other in seen)
    assert hooks(network) == before
    assert statistics.activity_table()["n_tokens"].to_pylist()[-1] > 0
    with torch.inference_mode():
        whole = network(**inputs).logits
    assert whole.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_fills_no_cache(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, TEXTS)
    with torch.inference_mode():
        whole, output = model.network(**batch.to(model.device, model.network.dtype)), forward(model, batch)

    def caches(answer):
        parts = (answer, getattr(answer, "language_model_outputs", None))
        return [part.past_key_values for part in parts if getattr(part, "past_key_values", None) is not None]

    assert caches(whole)
    assert not caches(output)


def rows_are_independent(model, samples) -> bool:
    """Return whether this machine gives a row of the plain network's logits the same bits alone as among others."""
    captions = [sample.caption for sample in samples]
    whole, _ = batch_of(model, captions)
    with torch.inference_mode():
        together = model.network(**whole.to(model.device, model.network.dtype)).logits
        for row, caption in enumerate(captions):
            single, _ = batch_of(model, [caption])
            alone = model.network(**single.to(model.device, model.network.dtype)).logits[0]
            if not torch.equal(alone, together[row, : len(alone)]):
                return False
    return True


def occurrences(tables):
    return {
        (row["sample_id"], row["position"], row["concept"]): (row["log_prob"], row["neurons"])
        for row in tables["occurrences"].to_pylist()
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_scores_do_not_depend_on_the_batch(open_model, size):
    model = open_model("demo")
    found, nouns = demo_samples(48)
    found = found[:12]
    together = occurrences(analyse(model, found, nouns, batch_size=8, top_k=50))
    apart = occurrences(analyse(model, found[::-1], nouns, batch_size=size, top_k=50))
    assert len({len(sample.caption) for sample in found}) > 3
    assert together.keys() == apart.keys()
    assert len(together) >= 12
    if rows_are_independent(model, found):
        assert together == apart
    for place, (log_prob, neurons) in together.items():
        assert apart[place][0] == pytest.approx(log_prob, rel=1e-4, abs=1e-5)
        # Neurons whose scores are equal but for the last bits may change places.
        assert [entry["score"] for entry in apart[place][1]] == pytest.approx(
            [entry["score"] for entry in neurons], rel=1e-4, abs=1e-5
        )


def test_contributions_average_over_a_noun_s_occurrences(open_model):
    model = open_model("llava")
    image, caption = picture(0), "a dog and two dogs"
    batch, places = batch_of(model, [caption])
    assert len(places) == 2
    scores = score_batch(model, batch, places).scores
    found = model.contributions(image, caption, "Dog")
    torch.testing.assert_close(found, torch.stack([layer.mean(0) for layer in scores]))
    assert not torch.allclose(scores[0][0], scores[0][1])


def test_layers_of_fewer_neurons_are_filled_up(open_model, loaded_with):
    model = loaded_with("qwen3_vl_moe", mlp_only_layers=[1])
    assert model.widths == (96, 48)
    found = model.contributions(picture(0), "a dog", "dog")
    assert found.shape == (2, 96)
    assert found[1, :48].abs().min() > 0
    assert not found[1, 48:].any()


def test_a_noun_of_several_tokens_is_the_sum_of_its_tokens(open_model):
    model = open_model("llava")
    batch, firsts = batch_of(model, ["A girl near the water.", "a dog"])
    mentions = [find_forms(text, NOUNS, "en") for text in ("A girl near the water.", "a dog")]
    places = [
        p for row, found in enumerate(mentions) for p in locate_mentions(batch, row, f"s{row}", found, every=True)
    ]
    assert [place for place in places if place.piece == 0] == firsts
    assert len(places) > len(firsts)
    single = score_batch(model, batch, places)
    kept, whole = whole_nouns(places, single)
    assert kept == firsts
    starts = [number for number, place in enumerate(places) if place.piece == 0]
    spelt = "".join(model.tokenizer.decode([place.token]) for place in places)
    assert spelt.split() == [place.concept for place in firsts]
    for noun, (start, stop) in enumerate(zip(starts, [*starts[1:], len(places)], strict=True)):
        torch.testing.assert_close(whole.log_prob[noun], single.log_prob[start:stop].sum())
        for layer in range(len(model.widths)):
            torch.testing.assert_close(whole.scores[layer][noun], single.scores[layer][start:stop].sum(0))
            assert torch.equal(whole.activation[layer][noun], single.activation[layer][start])


def test_a_census_sums_a_noun_s_tokens_where_it_is_asked_to(open_model):
    model = open_model("llava")
    found = [sample(0, "A girl near the water.")]
    first, whole = (analyse(model, found, pieces=pieces)["occurrences"].to_pylist() for pieces in ("first", "sum"))
    assert [row["position"] for row in first] == [row["position"] for row in whole]
    scores = {row["concept"]: model.contributions(png(picture(0)), found[0].caption, row["concept"]) for row in first}
    sums = {
        row["concept"]: model.contributions(found[0].image, found[0].caption, row["concept"], pieces="sum")
        for row in whole
    }
    assert scores.keys() == sums.keys()
    for row in whole:
        entry = row["neurons"][0]
        assert entry["score"] == pytest.approx(float(sums[row["concept"]].max()), rel=1e-4)
        assert row["log_prob"] < next(other["log_prob"] for other in first if other["concept"] == row["concept"])
