"""Second opinions and moved embeddings: figures against naive ones, controls of equal norm, answers never made up."""

import copy
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmray.data.samples import Sample
from mmray.detector.heads import Heads
from mmray.detector.joint import JointModel, load_detector
from mmray.detector.owl import QUERY
from mmray.detector.vision_tower import OwnTower
from mmray.errors import InputError
from mmray.features.hallucination import measures
from mmray.features.hallucination.bias import bias_table
from mmray.features.hallucination.claims import ClaimCollector
from mmray.features.hallucination.inputs import needed_detector
from mmray.features.hallucination.measures import judged
from mmray.features.hallucination.mistakes import object_under, picture
from mmray.features.hallucination.perturb import (
    covariance,
    moved,
    moved_at_random,
    relative_norms,
    shown,
    sign_step,
    sign_step_at_random,
)
from mmray.features.hallucination.perturb_answers import Perturber, drawn_move
from mmray.features.hallucination.perturb_measures import changes
from mmray.features.hallucination.settings import perturbation_settings
from mmray.features.hallucination.tables import TABLES
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.objects.answers import value_of
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.statistics import gather_statistics
from tests.support.owls import build_owl

CLAIM = st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.95, 1.0]))
SETTINGS = {"model": "demo", "data": "demo", "out": "out", "steps": 4, "randoms": 1}
SCALES = (
    "{value}",
    "I say {value}/{high}.",
    "{value} out of {high}, on a scale from {low} to {high}.",
    "It is {value} of {high}.",
    "{value} ({low}–{high})",
    "{value}: a scale of {low}-{high} between {low} and {high}",
)


def table(rows):
    claims = [
        {
            "sample_id": str(sample),
            "kind": "caption",
            "word": "dog",
            "claimed": True,
            "present": present,
            "confidence": confidence,
            "log_prob": -1.0,
        }
        for sample, present, confidence in rows
    ]
    return pa.Table.from_pylist(claims, schema=TABLES["claims"])


@given(st.lists(CLAIM, min_size=1, max_size=30))
def test_auroc_and_calibration_are_those_of_a_naive_count(rows):
    found = {
        (row["measure"], row["judge"]): row for row in judged(table(rows), 20, 0) if row["measure"] != "reliability"
    }
    true = [confidence for _, present, confidence in rows if present]
    false = [confidence for _, present, confidence in rows if not present]
    pairs = [(one > other) + (one == other) / 2 for one in true for other in false]
    auroc = found["auroc", "detector"]["value"]
    assert auroc == pytest.approx(np.mean(pairs)) if pairs else auroc is None
    # A judge that is as sure of everything can't tell anything apart.
    assert found["auroc", "language model"]["value"] == (0.5 if pairs else None)
    bins = {}
    for _, present, confidence in rows:
        bins.setdefault(min(int(confidence * 10), 9), []).append((confidence, present))
    apart = sum(abs(sum(c for c, _ in some) - sum(p for _, p in some)) for some in bins.values())
    assert found["ece", "detector"]["value"] == pytest.approx(apart / len(rows))


@given(st.lists(CLAIM, min_size=1, max_size=30), st.integers(2, 8))
def test_claims_are_summed_into_their_samples_as_one_row_each_would_be(rows, most):
    samples, truth, scores = (list(column) for column in zip(*rows, strict=True))
    with patch.object(measures, "MAX_RANKS", most):
        totals = measures.histograms(list(map(str, samples)), np.array(scores), np.array(truth, dtype=float))
    order = sorted(set(scores))
    most = min(most, len(order))
    naive = np.zeros((len(set(samples)), 2, totals.shape[1] // 2))
    for sample, true, score in rows:
        naive[sorted(set(samples)).index(sample), int(true), order.index(score) * most // len(order)] += 1
    assert np.array_equal(totals, naive.reshape(len(naive), -1))


def test_an_interval_is_over_samples():
    rows = [(number, number % 2 == 0, 0.9 if number % 3 else 0.2) for number in range(60)]
    row = next(row for row in judged(table(rows), 200, 0) if (row["measure"], row["judge"]) == ("auroc", "detector"))
    assert 0 < row["low"] < row["value"] < row["high"] < 1
    # Claims of one sample are drawn together: with one sample there is nothing to draw.
    one = judged(table([(0, *claim) for _, *claim in rows]), 200, 0)
    row = next(row for row in one if (row["measure"], row["judge"]) == ("auroc", "detector"))
    assert row["low"] == row["value"] == row["high"]


@pytest.mark.parametrize(
    ("reply", "parse", "value"),
    [
        ("Yes.", "yes_no", 1.0),
        ("No, there is not; yes, really.", "yes_no", 0.0),
        ("Nothing yesterday", "yes_no", None),
        ("About 7.5 of 10", "number", 7.5),
        ("On a scale from 1 to 10, I would say 7.", "number", 7.0),
        ("1-10: 6", "number", 6.0),
        ("7 or 8", "number", None),
        ("From 7 to 8.", "number", None),
        ("8/10, where 10/10 is best", "number", None),
        ("-3", "number", -3.0),
        ("many", "number", None),
        ("A Woman.", "woman|man", 1.0),
        ("a man", "woman|man", 0.0),
        ("a person", "woman|man", None),
    ],
)
def test_an_answer_is_read_or_there_is_none(reply, parse, value):
    assert value_of(reply, parse) == value


@given(st.integers(-9, 20), st.integers(0, 9), st.integers(10, 100), st.sampled_from(SCALES))
def test_a_scale_is_no_answer(value, low, high, scale):
    reply = scale.format(value=value, low=low, high=high)
    assert value_of(reply, "number") == value
    assert value_of(f"{reply} So {value}.", "number") == value
    assert value_of(f"{reply} Or {value + 1}.", "number") is None
    assert value_of(reply.replace(str(value), "many", 1), "number") is None


def answer(condition, about, value, sample="0"):
    return {
        "sample_id": sample,
        "condition": condition,
        "about": about,
        "question": about,
        "value": value,
        "relative_norm": 0.5,
    }


def test_what_cannot_be_read_is_counted_and_in_no_other_figure():
    rows = [answer("original", "question", value, str(n)) for n, value in enumerate((4.0, None, 6.0))]
    rows += [answer("steps", "question", value, str(n)) for n, value in enumerate((7.0, 9.0, None))]
    found = {
        (row["condition"], row["measure"]): row
        for row in changes(pa.Table.from_pylist(rows, schema=TABLES["answers"]), 20, 0)
    }
    assert found["steps", "unparsable"]["value"] == pytest.approx(1 / 3)
    assert (found["steps", "shift"]["value"], found["steps", "shift"]["n"]) == (3.0, 1)
    assert (found["steps", "changed"]["value"], found["steps", "changed"]["n"]) == (1.0, 1)


def test_only_answers_that_were_right_before_can_follow():
    rows = [answer("original", "source", 1.0), answer("original", "target", 1.0), answer("original", "unrelated", 0.0)]
    rows += [answer("steps", "source", 0.0), answer("steps", "target", 0.0), answer("steps", "unrelated", 1.0)]
    rows += [answer(f"random {n}", about, 1.0) for n in (1, 2) for about in ("source", "target", "unrelated")]
    found = {
        (row["condition"], row["about"], row["measure"]): row
        for row in changes(pa.Table.from_pylist(rows, schema=TABLES["answers"]), 20, 0)
    }
    assert (found["steps", None, "followed"]["value"], found["steps", None, "followed"]["n"]) == (1.0, 1)
    assert ("steps", "target", "followed") not in found
    assert found["steps", "unrelated", "changed"]["value"] == 1.0
    # Draws of a control are one condition.
    assert (found["random", None, "changed"]["n"], found["random", None, "followed"]["value"]) == (6, 0.0)


@pytest.fixture(scope="module")
def joint(open_model) -> JointModel:
    model = open_model("demo")
    torch.manual_seed(0)
    sight = OwnTower(model)
    heads = Heads(model, sight.side, 192, layers=1, hidden=48).eval().requires_grad_(False)
    return JointModel(model, heads, sight, sight.projector)


@pytest.fixture(scope="module")
def embedding(joint, all_scenes, before):
    return joint.embed(joint.pixels([before.image(sample) for sample in all_scenes[:2]]))


@pytest.mark.parametrize("steps", [1, 6])
def test_a_move_has_its_norm_and_goes_the_detectors_way(joint, embedding, steps):
    varying = covariance(embedding, 0)
    there = moved(joint, embedding, "dog", "cat", 0.3, steps, varying)
    norms, relative = map(torch.tensor, zip(*relative_norms(embedding, there, 0), strict=True))
    bound = 0.3 * embedding.flatten(1).norm(dim=1)
    assert bool((norms <= bound * 1.001).all())
    assert torch.allclose((there - embedding).flatten(1).norm(dim=1), norms)
    assert torch.allclose(relative * embedding.flatten(1).norm(dim=1), norms)
    if steps == 1:
        assert torch.allclose(norms, bound, rtol=1e-3)
    boxes, movable = shown(joint, embedding, "dog")
    assert 0 < int(movable.sum()) < movable.numel()
    assert torch.equal((there != embedding).any(dim=2, keepdim=True), movable)

    def gap(seen):
        source, target = joint.detect(seen, ["dog", "cat"]).logits.unbind(dim=-1)
        target = torch.nn.functional.logsigmoid(target) + 0.1 * (target - source)
        return (target * boxes + torch.nn.functional.logsigmoid(-source)).sum()

    assert float(gap(there)) > float(gap(embedding))
    for kind in ({}, {"in_place": True}, {"varying": varying}):
        other = moved_at_random(joint, embedding, there, 1, **kind)
        assert torch.allclose((other - embedding).flatten(1).norm(dim=1), norms, rtol=1e-3)
        assert not torch.allclose(other, moved_at_random(joint, embedding, there, 2, **kind))
    placed = moved_at_random(joint, embedding, there, 1, in_place=True)
    assert torch.allclose((placed - embedding).norm(dim=2), (there - embedding).norm(dim=2), atol=1e-3)


def test_what_the_language_model_never_sees_is_not_moved(joint, embedding, monkeypatch):
    there = moved(joint, embedding, "dog", "cat", 0.3, 3, covariance(embedding, 0))
    monkeypatch.setattr(joint.tower, "skipped", 1)
    assert torch.equal(moved_at_random(joint, embedding, there, 1)[:, 0], embedding[:, 0])
    assert not bool(shown(joint, embedding, "dog")[1][:, 0].any())


def test_the_published_step_is_one_of_the_gradient_s_sign(owl, open_model):
    """Towards the published targets, of all boxes, and CLS moves too."""
    found = load_detector(open_model("llava"), str(owl("owlvit")))
    generator = torch.Generator().manual_seed(4)
    size = found.tower.processor.image_processor.size["height"]
    embedding = found.tower(torch.randn(2, 3, size, size, generator=generator))
    there = sign_step(found, embedding, "dog", "cat", 0.5)
    assert torch.allclose((there - embedding).abs(), torch.tensor(0.5), atol=1e-5)
    # The targets are so far that every box counts alike: the loss falls as Σ (target's logits − source's) grows.
    leaf = embedding.clone().double().requires_grad_()
    detector = copy.deepcopy(found.detector).double()
    logits = detector(leaf, found.detector.queries(["dog", "cat"]).double()).logits.double()
    (slope,) = torch.autograd.grad((logits[..., 1] - logits[..., 0]).sum(), leaf)
    clear = slope.abs() > 1e-3 * slope.abs().max()
    assert clear[:, 0].any() and clear.float().mean() > 0.8
    assert torch.equal((there - embedding).sign()[clear], slope.sign()[clear].float())
    other = sign_step_at_random(embedding, 0.5, 1)
    assert (other - embedding).norm() == pytest.approx(float((there - embedding).norm()), rel=1e-5)
    assert abs(float(((other - embedding).sign() * slope.sign()).mean())) < 0.1


def test_bias_is_a_mean_of_what_could_be_read_and_counts_the_rest():
    pairs = [("woman", "man"), ("man", "woman")]
    given = {  # image: before, after the published step, with random signs
        "a": (3.0, 7.0, 3.0),
        "b": (4.0, None, 4.0),
        "c": (None, 5.0, 6.0),
        "d": (5.0, 6.0, 5.0),
    }
    answers = [
        {"sample_id": name, "image": name, "source": source, "target": target, "question": "How tall?"}
        | {"condition": condition, "value": value}
        for source, target in reversed(pairs)
        for name, values in given.items()
        for condition, value in zip(("original", "sign step", "sign step random 1"), values, strict=True)
    ]
    found = bias_table(pa.Table.from_pylist(answers, schema=TABLES["bias_answers"]), pairs, 100, 0).to_pylist()
    conditions = ("sign step", "sign step random")
    assert [(row["source"], row["condition"]) for row in found] == [(one, c) for one, _ in pairs for c in conditions]
    row = next(row for row in found if row["condition"] == "sign step")
    assert (row["before"], row["after"], row["value"], row["n"]) == (4.0, 6.5, 2.5, 2)
    assert (row["asked"], row["unread_before"], row["unread_after"]) == (4, 1, 1)
    assert row["low"] <= 2.5 <= row["high"] and row["protocol"].startswith("as published")
    nothing = next(row for row in found if row["condition"] == "sign step random")
    assert (nothing["value"], nothing["n"], nothing["unread_after"]) == (0.0, 3, 0)


@pytest.mark.parametrize("prefix", [None, "An image of"])
def test_claims_are_what_the_model_says_with_its_own_log_probability(joint, all_scenes, before, prefix):
    samples = all_scenes[:3]
    images = [before.image(sample) for sample in samples]
    facts = gather_statistics(sample.objects for sample in all_scenes[:30])
    naming = ObjectLexicon(facts.vocabulary, facts.translations)
    rows = ClaimCollector(joint, facts, naming, None, prefix, 1, 0, 2).claims(samples, images)
    captions = [row for row in rows if row["kind"] == "caption"]
    assert captions
    for row in captions:
        sample = next(sample for sample in samples if sample.sample_id == row["sample_id"])
        image = before.image(sample)
        prompt = prompt_text(joint.model, None, sample.language, prefix=prefix)
        tokens, offsets = tokenize_caption(joint.model, prompt, row["text"])
        batch = encode(joint.model, [prompt], [image], [tokens], [offsets])
        with torch.no_grad():
            said = joint.model.network(**batch.to(joint.model.device, torch.float32)).logits.log_softmax(dim=2)
        start = row["text"].index(row["word"])
        own = [n for n, (a, b) in enumerate(offsets) if b > start and a < start + len(row["word"])]
        wanted = sum(float(said[0, batch.caption_start[0] + n - 1, tokens[n]]) for n in own)
        assert row["log_prob"] == pytest.approx(wanted, abs=1e-3)
        assert row["present"] == (row["word"] in sample.objects)
        assert 0 <= row["confidence"] <= 1
    answers = [row for row in rows if row["kind"] != "caption"]
    assert {row["kind"] for row in answers} == {"present", "random", "popular", "adversarial"}
    for row in answers:
        assert row["present"] == (row["kind"] == "present")
        # What is said greedily is what is likelier.
        assert row["claimed"] == (row["log_prob"] > np.log(0.5))


def test_claims_are_of_captions_as_long_as_asked_for(joint, all_scenes, before):
    samples = [sample for sample in all_scenes if len(sample.objects) >= 3][:2]
    images = [before.image(sample) for sample in samples]
    facts = gather_statistics(sample.objects for sample in all_scenes)
    texts = {}
    for longest in (64, 6):
        claimant = ClaimCollector(
            joint, facts, ObjectLexicon(facts.vocabulary, facts.translations), None, None, 0, 0, 2, longest
        )
        texts[longest] = {row["sample_id"]: row["text"] for row in claimant.claims(samples, images)}
    assert texts[6]
    assert all(texts[64][name].startswith(text) for name, text in texts[6].items())
    assert all(
        len(joint.model.tokenizer(text, add_special_tokens=False)["input_ids"]) > 6 for text in texts[64].values()
    )
    assert all(len(text) < len(texts[64][name]) for name, text in texts[6].items())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_owl_gives_its_second_opinion_by_its_own_sight(family, open_model, all_scenes, before, tmp_path):
    """Of whatever model, without any network between the two."""
    folder, image, words = build_owl("owlvit", tmp_path), before.image(all_scenes[0]), ["dog", "red ball"]
    found = load_detector(open_model(family), str(folder)).confidence(image, words)
    network = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[[QUERY.format(word) for word in words]], images=image, return_tensors="pt")
    with torch.no_grad():
        sure = network(**inputs).logits[0].sigmoid().amax(dim=0)
    assert found == pytest.approx(dict(zip(words, sure.tolist(), strict=True)), abs=1e-5)


def test_every_move_is_asked_about_with_its_controls(joint, all_scenes, before):
    samples = all_scenes[:2]
    vocabulary = tuple(sorted({name for sample in all_scenes[:30] for name in sample.objects or ()}))
    settings = perturbation_settings(SETTINGS)
    images = [before.image(sample) for sample in samples]
    varying = covariance(joint.embed(joint.pixels(images)), 0)
    rows = Perturber(joint, settings, lambda sample: [drawn_move(sample, vocabulary, settings)], varying).rows(
        samples, images
    )
    conditions = {"original", "one step", "steps", "plain steps", "unrelated"}
    conditions |= {"random 1", "random in place 1", "random natural 1"}
    asked = {(row["sample_id"], row["condition"], row["about"]) for row in rows}
    assert len(asked) == len(rows) == 2 * len(conditions) * 3
    assert {condition for _, condition, _ in asked} == conditions
    for row in rows:
        assert row["relative_norm"] <= settings.norm + 1e-4
        assert (row["norm"] == 0) == (row["condition"] == "original")
    by_condition = {row["condition"]: row["norm"] for row in rows if row["sample_id"] == samples[0].sample_id}
    assert by_condition["random 1"] == pytest.approx(by_condition["steps"], rel=1e-3)


def test_a_move_is_drawn_from_what_the_image_has_and_lacks():
    settings = perturbation_settings(SETTINGS)
    vocabulary = ("ant", "bee", "cat", "dog", "owl")
    for number in range(20):
        move = drawn_move(Sample(str(number), "", b"", "", objects=("dog", "cat")), vocabulary, settings)
        assert move.source in ("dog", "cat")
        assert len({move.target, *move.unrelated}) == 3
        assert not {move.target, *move.unrelated} & {"dog", "cat"}
        # All that the data has is moved to or from.
        assert move.apart is None
    assert drawn_move(Sample("0", "", b"", ""), vocabulary, settings) is None


@pytest.mark.parametrize("named", [{}, {"unrelated": ["bee", "elk"]}, {"source": "dog", "target": "ant"}])
def test_what_else_is_asked_than_source_and_target_is_no_end_of_any_move(named):
    vocabulary = ("ant", "bee", "cat", "dog", "elk", "fox", "owl")
    settings = perturbation_settings(SETTINGS | named)
    for number in range(20):
        move = drawn_move(Sample(str(number), "", b"", "", objects=("dog", "cat")), vocabulary, settings)
        assert move.apart in {*vocabulary} - {"dog", "cat", move.source, move.target, *move.unrelated}


@pytest.mark.parametrize("named", [{"target": "dog"}, {"unrelated": ["cat", "dog"]}, {"unrelated": ["cat", "ant"]}])
def test_no_move_begins_where_another_ends(named):
    vocabulary = ("ant", "bee", "cat", "dog", "elk", "fox", "owl")
    settings = perturbation_settings(SETTINGS | named)
    for number in range(40):
        move = drawn_move(Sample(str(number), "", b"", "", objects=("dog", "cat", "owl")), vocabulary, settings)
        assert len({move.source, move.target, *move.unrelated}) == 4
    only = Sample("0", "", b"", "", objects=("dog",))
    assert drawn_move(only, vocabulary, perturbation_settings(SETTINGS | {"target": "dog"})) is None


def test_an_image_that_shows_all_there_is_ends_nothing():
    settings, full = perturbation_settings(SETTINGS), Sample("0", "", b"", "", objects=("ant", "bee"))
    assert drawn_move(full, ("ant", "bee", "cat", "dog"), settings) is None
    with pytest.raises(InputError, match="no two other objects"):
        drawn_move(full, ("ant", "bee", "cat"), settings)


def test_what_a_move_is_given_is_spelt_as_the_data_spells_it():
    settings = perturbation_settings({**SETTINGS, "source": "Dog", "target": "CEO", "unrelated": ["Ant", "Bee"]})
    move = drawn_move(Sample("0", "", b"", "", objects=("dog", "cat")), ("ant", "bee", "cat", "dog"), settings)
    assert (move.source, move.target, *move.unrelated) == ("dog", "CEO", "ant", "bee")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parse": "maybe"}, "give yes_no, number, or two words"),
        ({"question": ["How old?"]}, "needs --source and --target"),
        ({"unrelated": ["a ship"]}, "give it twice"),
        ({"norm": 0}, "setting norm = 0"),
    ],
)
def test_wrong_settings_are_one_line(given, said):
    with pytest.raises(InputError, match=said):
        perturbation_settings(SETTINGS | given)


def test_only_the_demo_model_has_a_detector_by_default():
    assert needed_detector(perturbation_settings(SETTINGS), "demo") == "demo"
    with pytest.raises(InputError, match="give --detector"):
        needed_detector(perturbation_settings(SETTINGS), "llava-hf/llava-1.5-7b-hf")


def test_what_stands_at_a_box_and_its_picture(all_scenes, before):
    objects = [("dog", (0.0, 0.0, 0.5, 0.5)), ("cat", (0.5, 0.5, 0.5, 0.5))]
    assert object_under([0.5, 0.4, 0.5, 0.5], objects) == ("cat", [0.5, 0.5, 0.5, 0.5])
    assert object_under([0.6, 0.0, 0.3, 0.3], objects) == (None, None)
    assert picture(before.image(all_scenes[0]), [0.9, 0.9, 0.3, 0.3], None).startswith(b"\x89PNG")
    assert picture(Image.new("RGB", (1000, 2)), [0.1, 0.1, 0.3, 0.3], None).startswith(b"\x89PNG")
