"""What is observed is what a plain forward shows, and means don't depend on how their rows were cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmray
from mmray.demo import DATA
from mmray.features.census.settings import census_settings
from mmray.features.properties.captions import regenerated
from mmray.features.properties.comparison import METHODS, Comparison
from mmray.features.properties.effects import LAYER_MATCHED, AblationEffects, noise
from mmray.features.properties.maps import SINGLES, box_of, draw_maps
from mmray.features.properties.meaning import invariance, region_invariance, sensitivity
from mmray.features.properties.observations import Key, Observations, summarise
from mmray.features.properties.probe import Probe
from mmray.features.properties.settings import DECODED, MOST, RANKINGS, property_settings
from mmray.features.properties.subject import ConceptInputs, Ranked, Study, Subject
from mmray.features.properties.tables import PARTS
from mmray.models.blocks import permuted_image
from mmray.models.capture import capture_input
from mmray.models.norms import vocabulary_logits
from mmray.models.parts import output_rows
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import NounSource
from mmray.neurons.scoring import score_batch
from tests.support.samples import LEXICON, samples, samples_of, settings

Model = Callable[[str], Any]


def decoded(count: int, tokens: str = "x", suppressed: str = "y") -> pa.Table:
    return pa.table({"tokens": [[tokens]] * count, "suppressed": [[suppressed]] * count})


@pytest.fixture(scope="module")
def subject(open_model: Model) -> Subject:
    model = open_model("demo")
    english = [sample for sample in samples_of(DATA, 400) if sample.language == "en"]
    own = [sample for sample in english if "hammer" in sample.objects][:4]
    others = [sample for sample in english if "hammer" not in sample.objects][:3]
    asked = census_settings({"model": "demo", "data": "demo", "out": "unused"})
    vocabulary = tuple(sorted({name for sample in english for name in sample.objects}))
    study = Study(model, asked, NounSource("objects", vocabulary), decoded(sum(model.widths)))
    neurons = tuple((7, unit) for unit in range(MOST))
    ranked = {name: Ranked(neurons, (1.0,) * MOST) for name in RANKINGS}
    names = [tuple(sample.sample_id for sample in part) for part in (own, others)]
    inputs = ConceptInputs("hammer", "hammer", "en", ranked, ranked["score"], names[0], names[1], ())
    encoded = study.encoded([*own, *others])
    assert encoded is not None
    return Subject(study, inputs, *encoded)


@pytest.mark.parametrize("variant", ["llava", "blip2_t5", "mllama"])
def test_nothing_is_said_of_patches_that_are_not_in_the_sequence(open_model, variant):
    model = open_model(variant)
    neurons = tuple((1, unit) for unit in range(DECODED))
    study = Study(model, settings(), LEXICON, decoded(sum(model.widths)))
    ranked = {name: Ranked(neurons, (1.0,) * DECODED) for name in RANKINGS}
    encoded = study.encoded(samples(8))
    assert encoded is not None
    subject = Subject(
        study, ConceptInputs("dog", "dog", "en", ranked, ranked["score"], ("s0", "s2", "s6"), (), ()), *encoded
    )
    found = Observations()
    again = regenerated(subject)
    region_invariance(subject, again, found)
    assert bool(found.observations) == (variant == "llava")
    invariance(subject, found)
    Comparison(subject, again, found).observe(AblationEffects(subject).ablator.resumes)
    rows = found.tables()["observations"].to_pylist()
    methods = {row["method"] for row in rows if row["property"] == "comparison"}
    assert methods == set(METHODS) - (set() if variant == "llava" else {"gradient"})
    assert {"image_invariance", "comparison"} <= {row["property"] for row in rows}


def test_maps_of_several_concepts_are_those_of_each(subject):
    """In batches smaller than the images, of which one is of two concepts; what can't be drawn is told by itself."""
    asked = subject.study.settings.model_copy(update={"batch_size": 2})
    study = replace(subject.study, settings=asked)
    given = {item.sample.sample_id: item.sample for item in subject.items}
    hammer = replace(subject.inputs, maps=subject.inputs.own[:3])
    other = replace(subject.inputs, concept="dog", maps=(*subject.inputs.others[:2], subject.inputs.own[0]))
    whole = draw_maps(study, [hammer, other], given)
    single = [draw_maps(study, [inputs], given) for inputs in (hammer, other)]
    rows, apart = whole.heatmaps, [row for part in single for row in part.heatmaps]
    assert len(rows) == 2 * 6 + 2 * SINGLES
    for row, alone in zip(rows, apart, strict=True):
        values = row.pop("values"), alone.pop("values")
        assert torch.allclose(*map(torch.tensor, values), atol=1e-4)
        assert row == alone
    assert whole.observations == [row for part in single for row in part.observations]
    wrong = replace(other, concept="cat", own=(), ranked={name: Ranked(((99, 0),) * 10, ()) for name in RANKINGS})
    found = Observations()
    Probe(study, property_settings({"run": "unused"})).unit(
        [replace(hammer, own=()), wrong, replace(other, own=())], given, found
    )
    assert len(found.heatmaps) == len(rows)
    assert [error["source"] for error in found.errors] == ["cat"]


def test_maps_are_compared_with_those_of_gates_and_without_signs(subject):
    given = {item.sample.sample_id: item.sample for item in subject.items}
    several = [name for name in subject.inputs.own if len(given[name].objects) > 1]
    turned = Ranked(subject.inputs.ranked["score"].neurons, (1.0, -1.0) * (MOST // 2))
    inputs = replace(subject.inputs, maps=tuple(several), ranked=dict.fromkeys(RANKINGS, turned))
    found = draw_maps(subject.study, [inputs], given)
    methods = {row["method"] for row in found.observations if row["measure"] == "iou"}
    assert methods == {*RANKINGS, "unsigned", "gate", "layer-matched"}
    assert {row["method"] for row in found.heatmaps if row["neuron"] is None} == set(RANKINGS)
    # The maps of single neurons are those that a user draws.
    singles = [row for row in found.heatmaps if row["neuron"] is not None]
    assert [row["neuron"] for row in singles] == [f"L{layer}.u{unit}" for layer, unit in turned.neurons[:SINGLES]]
    for row, sign in zip(singles, turned.signs, strict=False):
        drawn, _ = subject.study.model.patch_map(given[row["sample_id"]].image, row["neuron"], signs=[sign])
        assert torch.allclose(torch.tensor(row["values"]), drawn.flatten(), atol=1e-4)
    values = {
        method: [row["value"] for row in found.observations if (row["measure"], row["method"]) == ("iou", method)]
        for method in methods
    }
    assert values["score"] == values["specific"]
    assert len({tuple(values[method]) for method in ("score", "unsigned", "gate")}) == 3


@pytest.mark.slow
def test_what_neurons_write_is_told_by_their_sign(subject):
    """The noun is what all neurons suppress: those write it whose activation is negative, in the run or here."""
    inputs = subject.inputs
    study = replace(subject.study, decoded=decoded(sum(subject.model.widths), "x", inputs.concept))
    neurons = inputs.ranked["score"].neurons
    signs = {"score": (1.0,) * MOST, "specific": (1.0,) * 9 + (-1.0,) * (MOST - 9)}
    ranked = {name: Ranked(neurons, signs[name]) for name in RANKINGS}
    given = Subject(study, replace(inputs, ranked=ranked), subject.items, subject.batch)
    found = Observations()
    sensitivity(given, found)
    Comparison(given, None, found).observe(AblationEffects(given).ablator.resumes)
    hits = {
        (row["property"], row["method"], row["sample_id"]): row["value"]
        for row in found.observations
        if row["measure"] == "lemma_hit_rate"
    }
    assert hits["sensitivity", "score", "hammer"] == 0
    assert hits["sensitivity", "specific", "hammer"] == 1
    contributions, activations = given.contributions[given.own], given.own_activations
    for place, name in enumerate(given.own_samples):
        best = contributions[place].topk(DECODED).indices
        assert hits["sensitivity", "image", name] == bool((activations[place, best] < 0).any())
    written = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        best = contributions[half].mean(dim=0).topk(DECODED).indices
        written.append((activations[half].mean(dim=0)[best] < 0).float())
    expected = sum(bool(half.any()) for half in written) / 2
    assert hits["comparison", "contribution", "hammer"] == expected
    (share,) = [row["value"] for row in found.observations if row["measure"] == "inference_score"][:1]
    assert share == pytest.approx(float(torch.stack(written).mean()))
    assert 0 < hits["sensitivity", "uniform", "hammer"] <= 1


def test_places_are_the_noun_in_its_images_and_others_elsewhere(subject):
    assert subject.usable
    assert len(subject.own_samples) == len(set(subject.own_samples)) == 4
    assert not set(subject.own_samples) & set(subject.other_samples)
    assert set(subject.other_samples) <= set(subject.inputs.others)


def test_falls_are_those_of_plain_forwards(subject):
    effects, neurons = AblationEffects(subject), subject.inputs.ranked["score"].neurons
    model, batch, places = subject.model, subject.batch, subject.positions
    before = score_batch(model, batch, places).log_prob.exp()
    for change in (mmray.ablate, lambda *given: noise(*given, 2.0), lambda *given: mmray.scale(*given, 5.0)):
        with change(model, neurons):
            after = score_batch(model, batch, places).log_prob.exp()
        found = effects.falls(neurons, change(model, neurons))
        torch.testing.assert_close(found[0], before - after, atol=1e-4, rtol=1e-3)
    assert torch.equal(score_batch(model, batch, places).log_prob.exp(), before)


@pytest.mark.slow
def test_methods_are_measured_on_the_images_that_did_not_rank_their_neurons(subject):
    found = Observations()
    Comparison(subject, None, found).observe(resumes=True)
    model, batch, own, names = subject.model, subject.batch, subject.own, subject.own_samples
    scores = score_batch(model, batch, subject.positions, "activation").scores
    activations = torch.cat(scores, dim=1)[own]
    before = score_batch(model, batch, subject.positions).log_prob.exp()[own]
    expected = {}
    for ranking, measured in ((0, 1), (1, 0)):
        best = activations[ranking::2].mean(dim=0).topk(MOST).indices.tolist()
        with mmray.ablate(model, subject.study.locate(best)):
            after = score_batch(model, batch, subject.positions).log_prob.exp()[own]
        expected |= dict(zip(names[measured::2], (before - after)[measured::2].tolist(), strict=True))
    rows = [row for row in found.observations if row["method"] == "activation"]
    zeroed = {row["sample_id"]: row["value"] for row in rows if row["measure"] == "zeroed_own"}
    assert zeroed == pytest.approx(expected, abs=1e-4)
    assert {row["measure"] for row in rows} >= {"noise_own", "auroc", "overlap", "common_share", "inference_score"}
    # Every image of another noun is measured by one half.
    others = [row["sample_id"] for row in rows if row["measure"] == "zeroed_other"]
    assert sorted(others) == sorted(subject.other_samples)


def test_regenerated_captions_are_what_the_model_says_about_permuted_patches(subject):
    again = regenerated(subject)
    assert again is not None
    assert set(again.own_samples) <= set(subject.own_samples)
    with permuted_image(again.model, again.batch), torch.inference_mode():
        states = []
        with capture_input(again.model.norm, states.append):
            forward(again.model, again.batch)
    said = vocabulary_logits(again.model, states[0].flatten(0, 1)).argmax(dim=1).view(states[0].shape[:2])
    for row, tokens in enumerate(again.batch.tokens):
        start = again.batch.caption_start[row] - 1
        # Greedy: each token is the likeliest one, with the same patches in the same places.
        assert said[row, start : start + len(tokens)].tolist() == tokens
    found = Observations()
    region_invariance(subject, again, found)
    rows = [row for row in found.observations if row["neurons"] == DECODED and row["method"] == "contribution"]
    values = {row["sample_id"]: row["value"] for row in rows if row["measure"] == "overlap_regenerated"}
    with permuted_image(again.model, again.batch):
        anew = torch.cat(score_batch(again.model, again.batch, again.positions).scores, dim=1)[again.own]
    for name, scores in zip(again.own_samples, anew, strict=True):
        old = subject.contributions[subject.own][subject.own_samples.index(name)]
        shared = set(old.topk(DECODED).indices.tolist()) & set(scores.topk(DECODED).indices.tolist())
        assert values[name] == len(shared) / DECODED
    named = {row["sample_id"]: row["value"] for row in found.observations if row["measure"] == "regenerated_named"}
    assert named == {name: name in again.own_samples for name in subject.own_samples}


def test_noise_is_in_parts_of_the_rows_own_size(subject):
    model, neurons = subject.model, [(7, 3), (6, 5)]
    rows = [output_rows(model.network, model.projections[layer])[unit].clone() for layer, unit in neurons]
    with noise(model, neurons, 0.5):
        changed = [output_rows(model.network, model.projections[layer])[unit].clone() for layer, unit in neurons]
    added = torch.cat([after - before for before, after in zip(rows, changed, strict=True)])
    size = torch.cat(rows).square().mean().sqrt()
    assert added.square().mean().sqrt() == pytest.approx(float(0.5 * size), rel=0.15)


def test_effects_observe_every_dose_with_its_control(subject):
    found = Observations()
    AblationEffects(subject).observe(found)
    rows = found.tables()["observations"].to_pylist()
    seen = {(row["measure"], row["method"], row["neurons"]) for row in rows}
    assert {
        ("zeroed_own", method, MOST) for method in (*RANKINGS, LAYER_MATCHED, "activation-matched", "uniform")
    } <= seen
    own = [row for row in rows if row["measure"] == "zeroed_own"]
    assert {row["sample_id"] for row in own} == set(subject.own_samples)
    assert {row["sample_id"] for row in rows if row["measure"] == "zeroed_other"} == set(subject.other_samples)


def test_boxes_are_found_by_names_in_any_language(subject):
    from dataclasses import replace

    sample = next(item.sample for item in subject.items if len(item.sample.objects) > 1)
    name = sample.objects[1]
    inputs = replace(subject.inputs, concept=name)
    assert box_of(subject.study, inputs, sample) == sample.boxes[1]
    nouns = NounSource("objects", (), {name: {"es": "cosa"}})
    study = replace(subject.study, nouns=nouns)
    spanish = replace(sample, language="es")
    assert box_of(study, replace(inputs, concept="cosa"), spanish) == sample.boxes[1]
    assert box_of(study, replace(inputs, concept="nothing"), spanish) is None


ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.floats(-1, 1), st.sampled_from((1.0, 2.0))),
    min_size=1,
    max_size=20,
)


@given(ROWS, st.randoms())
def test_means_are_sums_over_images_in_any_order(rows, random):
    found = Observations()
    for concept, sample_id, value, of in rows:
        found.add(Key("causal", "zeroed_own", "score", 10), concept, sample_id, value, of)
    table = summarise(found.tables()["observations"], 20, 0)
    (whole,) = [row for row in table.to_pylist() if row["concept"] is None]
    assert whole["value"] == pytest.approx(sum(row[2] for row in rows) / sum(row[3] for row in rows))
    assert whole["n"] == len({row[1] for row in rows})
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = found.tables()["observations"].take(pa.array(order))
    assert summarise(shuffled, 20, 0) == table
    assert shuffled.schema == PARTS["observations"]


def test_clipscore_is_two_and_a_half_times_the_cosine():
    """Of a tiny CLIP with random weights, by its own features (Hessel et al. 2021)."""
    from types import SimpleNamespace

    from transformers import BatchFeature, CLIPConfig, CLIPModel

    from mmray.features.properties.meaning import CLIP_WEIGHT, Clip

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48}
    vision = small | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    features = {"input_ids": torch.tensor([[48, 3, 4, 49]]), "pixel_values": torch.randn(6, 3, 8, 8)}
    clip = object.__new__(Clip)
    clip.network, clip.processor = network, lambda **_: BatchFeature(features)
    with torch.inference_mode():
        found = network(**features)
    cosines = (found.image_embeds @ found.text_embeds.T)[:, 0]
    assert clip.scores([SimpleNamespace()] * 6, "x") == pytest.approx((CLIP_WEIGHT * cosines.clamp(min=0)).tolist())


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_folders_that_hold_no_clip_are_refused(folder, tmp_path):
    from mmray.errors import InputError
    from mmray.features.properties.meaning import Clip

    with pytest.raises(InputError, match=r"no config\.json there; give the folder of a CLIP"):
        Clip(str(tmp_path / folder), torch.device("cpu"))
