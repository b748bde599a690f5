"""What an edit must leave alone: the answers kept, how they are split, and what is said of an edit that breaks them."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmray.errors import InputError
from mmray.features.editing import before_edit, kept_answers, methods
from mmray.features.editing.bounds import BOUNDS
from mmray.features.editing.dataset import EditDataset, Prompt
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.edit import open_edit
from mmray.features.editing.kept_answers import images_to_keep, kept, presence_answers, read_kept_text, text_answers
from mmray.features.editing.methods import make_edit
from mmray.features.editing.resumed_forward import resume_all
from mmray.features.editing.settings import edit_settings
from mmray.features.editing.task import prepare
from mmray.features.editing.validation import broken, validate
from mmray.models.generation import generate
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.prompting import prompt_text
from mmray.neurons.model import open_image
from mmray.runs.run import open_run
from tests.support.samples import picture, png

QUICK = {"kept": 24, "samples": 8, "steps": 2}


@pytest.fixture(scope="module")
def demo_run(demo_census):
    return open_run(demo_census(384, shard_size=200))


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.json"
    prompts = ["What is a dog?", "Name a colour.", "What kind of thing is a tree?", "Say yes.", "What is the sun?"]
    path.write_text(
        json.dumps({"prompts": prompts, "texts": ["An image of a dog and a cat.", "A red tree on a hill."]})
    )
    return str(path)


@pytest.fixture(scope="module")
def dataset(open_model, demo_run):
    return EditDataset(open_model("demo"), demo_run)


@pytest.fixture(scope="module")
def task(dataset, few_texts):
    return prepare(dataset, [edit_settings({"source": "hammer", "target": "dog", "keep_text": few_texts} | QUICK)])


def test_no_image_and_no_prompt_is_both_learned_and_held_out(task):
    learned, held_out = task.kept.learned, task.kept.held_out
    assert list(learned) == list(held_out) == ["captions", "answers", "replies", "texts"]
    for part in (learned, held_out):
        assert len(part["captions"]) > 2
        assert {one.image for one in part["answers"]} <= {one.image for one in part["captions"]}

    def images(part):
        return {one.image for kind in ("captions", "answers") for one in part[kind]}

    assert not images(learned) & images(held_out)
    for kind in ("replies", "texts"):
        assert not {one.prompt for one in learned[kind]} & {one.prompt for one in held_out[kind]}
    assert task.held_out
    assert not {one.sample_id for one in task.new} & {one.sample_id for one in task.held_out}
    # What evaluation counts as reliability is what was learned from.
    assert set(task.purposes[0].samples) == {one.sample_id for one in task.new}


def test_answers_are_about_what_is_there_and_what_is_not(dataset):
    captions = kept(dataset, ["hammer"], 6, 0)
    answers = presence_answers(dataset, captions, ["hammer", "dog"], 0)
    assert len(answers) == 12
    for number, caption in enumerate(captions):
        there, absent = answers[2 * number : 2 * number + 2]
        assert there.image == absent.image == caption.image
        shown = dataset.present(dataset.samples[caption.sample_id])
        assert any(f" {name} in" in there.prompt for name in shown)
        assert not any(f" {name} in" in absent.prompt for name in shown)
    assert any("hammer" in one.prompt or "dog" in one.prompt for one in answers[3::4])


def test_swaps_of_small_models_keep_more_captions_unless_asked(dataset, monkeypatch):
    swap, suppression = {"source": "hammer", "target": "dog"}, {"suppress": "hammer"}

    def images(request, kept=None):
        return images_to_keep(dataset.model, edit_settings(request | {"kept": kept}))

    assert [images(swap, asked) for asked in (0, 1000, None)] == [0, 1000, kept_answers.KEPT_BY_SMALL]
    assert images(suppression) == kept_answers.KEPT < kept_answers.KEPT_BY_SMALL
    monkeypatch.setattr(kept_answers, "SMALL", 1)
    assert images(swap) == kept_answers.KEPT


def test_kept_text_is_general_or_a_file(dataset, few_texts, tmp_path):
    general, own = read_kept_text(None), read_kept_text(few_texts)
    assert min(len(general["prompts"]), len(general["texts"])) > 20
    assert len(own["prompts"]) == 5
    found = text_answers(dataset, few_texts)
    assert [len(found[kind]) for kind in ("replies", "texts")] == [5, 2]
    assert text_answers(dataset, few_texts) is found
    assert dataset.text(found["texts"][0].tokens) == "image of a dog and a cat."
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"prompts": [" Why? ", " "], "texts": [" Un chien.", "这是狗。", "!"]}))
    assert read_kept_text(str(own)) == {"prompts": ["Why?"], "texts": ["Un chien.", "这是狗。"]}
    assert [one.prompt for one in text_answers(dataset, str(own))["texts"]] == ["Un", "这"]
    wrong = ('{"prompts": "Why?", "texts": []}', '{"prompts": [], "texts": [null]}')
    for content in ("no json", '["a"]', '{"prompts": []}', *wrong):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=r"prompts and texts|no list of texts"):
            read_kept_text(str(tmp_path / "bad.json"))
    with pytest.raises(InputError, match="no such file"):
        read_kept_text(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(("family", "kinds"), [("blip2_opt", set()), ("llava", {"replies", "texts"})])
def test_text_is_kept_where_the_model_takes_text_alone(open_model, few_texts, family, kinds):
    dataset = EditDataset(open_model(family), SimpleNamespace())
    assert {kind for kind, examples in text_answers(dataset, few_texts).items() if examples} == kinds


def test_prompts_of_several_lengths_are_kept_in_a_family_that_answers_them_one_by_one(open_type):
    model = open_type("blip")
    dataset = EditDataset(model, SimpleNamespace())
    prompts = [prompt_text(model, text, "en") for text in ("Is it red?", "Is there a dog in this image?", "Why?")]
    image = png(picture(1))
    together = dataset.replies([Prompt(prompt, image) for prompt in prompts], 4)
    assert [one.tokens for one in together] == [dataset.replies([Prompt(p, image)], 4)[0].tokens for p in prompts]


def test_where_blocks_go_on_after_their_mlp_rows_can_be_zeroed_and_not_learned(dataset, demo_run, few_texts):
    model = copy.copy(dataset.model)
    vars(model)["projections"] = tuple(replace(one, ends_block=False) for one in model.projections)
    request = {"suppress": "hammer", "keep_text": few_texts, **QUICK}
    edit = make_edit(EditDataset(model, demo_run), [edit_settings(request | {"method": "zero"})])
    rows = output_rows(model.network, model.projections[-1])[edit.unit]
    torch.testing.assert_close(edit.delta, -rows)
    assert edit.facts["validation"] == {}
    with pytest.raises(InputError, match="use --method zero or scale"):
        make_edit(EditDataset(model, demo_run), [edit_settings(request)])


def test_unchanged_means_that_greedy_decoding_writes_the_same(dataset, task):
    model, deltas = dataset.model, Deltas(dataset.model, task.neurons[:30])
    captions = task.kept.learned["captions"]
    deltas.parameters[deltas.first][0].data.normal_(std=0.6, generator=torch.Generator().manual_seed(2))
    measures = validate(model, deltas, task.new, task.held_out, {"captions": captions})
    with deltas.added():
        images = [open_image(one.image, one.background) for one in captions]
        after = generate(model, [one.prompt for one in captions], images)
    same = sum(one.tokens[: len(row) + 1] == (*row, *dataset.end) for one, row in zip(captions, after, strict=True))
    assert 0 < same < len(captions)
    assert measures["image_locality"] == pytest.approx(same / len(captions), abs=1e-4)
    # Nothing to measure: left out, and no bound is broken by it.
    assert "image_locality_questions" not in measures
    assert "text_only_kl" not in measures


@pytest.mark.parametrize("compared", [10**6, 4])
def test_the_divergence_is_that_over_the_vocabulary_or_less(dataset, task, monkeypatch, compared):
    monkeypatch.setattr(before_edit, "COMPARED", compared)
    model, replies, shared = dataset.model, task.kept.learned["replies"], before_edit.BeforeEdit()
    for seed in (3, 4):
        deltas = Deltas(model, task.neurons[:30])
        deltas.parameters[deltas.first][0].data.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        # What tries share was made by the first, and must not be of its deltas.
        found = validate(model, deltas, [], [], {"replies": replies}, before=shared)
        assert found == validate(model, deltas, [], [], {"replies": replies})
        with torch.no_grad():
            logits = [
                (part.logits().log_softmax(1), part.logits(deltas)) for part, _ in resume_all(model, replies, deltas)
            ]
            terms = [(old.exp() * (old - new.log_softmax(1))).sum(1) for old, new in logits]
        expected = float(torch.cat(terms).mean())
        assert found["text_only_kl"] > 0
        if compared > 4:
            assert found["text_only_kl"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
        else:
            assert found["text_only_kl"] < expected


def test_an_untouched_model_keeps_all_and_takes_nothing(dataset, task):
    measures = validate(dataset.model, Deltas(dataset.model, task.neurons), task.new, task.held_out, task.kept.learned)
    assert measures["image_locality"] == measures["image_locality_questions"] == measures["perplexity_ratio"] == 1
    assert measures["text_only_16"] == measures["text_only_64"] == 1
    assert measures["text_only_kl"] == measures["pope_yes_ratio_change"] == 0
    assert set(measures) == {bound.measure for bound in BOUNDS}
    assert broken(measures) == ["reliability", "image_generality"]


def test_tries_that_order_answers_differently_share_nothing_wrong(dataset, task):
    model, shared = dataset.model, before_edit.BeforeEdit()
    # Of different lengths, and in another order than that of the batches that two layers need.
    answers = sorted(task.kept.held_out["captions"][:8], key=lambda one: -len(one.tokens))
    assert len(answers[0].tokens) > len(answers[-1].tokens)
    last = len(model.widths) - 1
    for neurons in ([(last - 1, 0), (last, 0)], [(last, 0)]):
        found = validate(model, Deltas(model, neurons), [], [], {"captions": answers}, before=shared)
        assert found["image_locality"] == 1


@pytest.mark.parametrize(
    ("broken_by_try", "openings"),
    [
        ([None], []),
        (["text_only_64", None], [(0.55, 15)]),
        # Takes and changes too much: the neurons open later.
        (["text_only_64", "image_locality", "image_locality"], [(0.55, 15), (0.8, 15)]),
        # Does not take: they open earlier, and then write more firmly.
        (["text_only_16", "reliability", "image_generality", None], [(0.55, 15), (0.35, 15), (0.35, 60)]),
        # Between the two there is nothing to try.
        (["text_only_64", "reliability", "image_locality"], [(0.55, 15), (0.35, 15)]),
        (["text_only_64", "image_locality", "reliability"], [(0.55, 15), (0.8, 15)]),
    ],
)
def test_patches_are_tried_where_located_neurons_change_text(dataset, few_texts, monkeypatch, broken_by_try, openings):
    measures = iter({name: 0.0} if name else {} for name in broken_by_try)
    monkeypatch.setattr(methods, "validate", lambda *_, **__: next(measures))
    edit = make_edit(dataset, [edit_settings({"suppress": "hammer", "keep_text": few_texts, **QUICK})])
    first, *others = edit.facts["tries"]
    assert (first["method"], first["neurons"]) == ("learned", 30)
    assert [one["method"] for one in others] == ["patch"] * len(openings)
    assert [(one["share"], one["margin"]) for one in others] == openings
    assert next(measures, None) is None
    # With a number of neurons, there is one try.
    monkeypatch.setattr(methods, "validate", lambda *_, **__: {"reliability": 0.0})
    edit = make_edit(dataset, [edit_settings({"suppress": "hammer", "keep_text": few_texts, "neurons": 5, **QUICK})])
    assert [one["neurons"] for one in edit.facts["tries"]] == [5]


@pytest.mark.parametrize("measure", ["reliability", "image_locality"])
def test_more_located_neurons_are_tried_before_patches_if_text_stays(dataset, few_texts, monkeypatch, measure):
    measures = iter([{measure: 0.0}, {"text_only_64": 0.0}, {}])
    monkeypatch.setattr(methods, "validate", lambda *_, **__: next(measures))
    edit = make_edit(dataset, [edit_settings({"suppress": "hammer", "keep_text": few_texts, **QUICK})])
    assert [one["method"] for one in edit.facts["tries"]] == ["learned", "learned", "patch"]
    assert [one["neurons"] for one in edit.facts["tries"][:2]] == [30, dataset.model.widths[-1]]


def test_where_neurons_can_t_be_rewritten_all_located_ones_are_tried(dataset, few_texts, monkeypatch):
    monkeypatch.setattr(methods, "validate", lambda *_, **__: {"reliability": 0.0})
    monkeypatch.setattr(methods, "patched", lambda _: None)
    edit = make_edit(dataset, [edit_settings({"suppress": "hammer", "keep_text": few_texts, **QUICK})])
    assert [one["neurons"] for one in edit.facts["tries"]] == [30, dataset.model.widths[-1]]


def test_an_edit_that_takes_is_chosen_before_one_that_breaks_less(dataset, few_texts, monkeypatch):
    takes, leaves = {"text_only_64": 0.0, "text_only_16": 0.0}, {"reliability": 0.0}
    measures = iter([leaves, takes, leaves, leaves, leaves])
    monkeypatch.setattr(methods, "validate", lambda *_, **__: next(measures))
    edit = make_edit(dataset, [edit_settings({"suppress": "hammer", "keep_text": few_texts, **QUICK})])
    assert edit.facts["validation"] == takes


def test_of_tries_that_take_the_one_that_exceeds_the_bounds_least_is_chosen(dataset, few_texts, monkeypatch):
    # 0.25 below 0.75 is a third of the limit; 0.04 below 0.95 and 0.02 below 0.90 are two bounds, but less.
    tries = [{"text_only_64": 0.5}, {"image_locality": 0.91, "text_only_16": 0.88}, {"text_only_64": 0.6}]
    measures = iter(tries)
    monkeypatch.setattr(methods, "validate", lambda *_, **__: next(measures))
    edit = make_edit(dataset, [edit_settings({"suppress": "hammer", "keep_text": few_texts, **QUICK})])
    assert len(edit.facts["tries"]) == 3
    assert edit.facts["validation"] == tries[1]


@pytest.mark.parametrize(
    ("measure", "value", "excess"),
    [
        ("reliability", 0.95, 0),
        ("reliability", 0.475, 0.5),
        ("text_only_kl", 0.005, 0),
        ("text_only_kl", 0.015, 2),
        ("perplexity_ratio", 1.0201, 0.01),
        ("pope_yes_ratio_change", -0.06, 1),
    ],
)
def test_the_excess_of_a_bound_is_a_fraction_of_its_limit(measure, value, excess):
    (bound,) = (bound for bound in BOUNDS if bound.measure == measure)
    assert bound.excess(value) == pytest.approx(excess)
    assert bound.allows(value) is (excess == 0)


def test_a_word_is_gone_when_another_is_said_in_its_place(dataset, task):
    model, old = dataset.model, task.new[0].rejected[1]
    deltas = Deltas(model, task.neurons)
    untouched = validate(model, deltas, task.new, [], {}, gone=True)
    assert untouched["reliability"] == 0
    # The old word's token falls wherever a neuron is active, and nothing speaks for the new words.
    unembedding = unembedding_rows(model.network, model.parts)[old]
    for layer, (parameters,) in deltas.parameters.items():
        parameters.data = -50 * unembedding.expand_as(deltas.rows(layer)).clone()
    assert validate(model, deltas, task.new, [], {}, gone=True)["reliability"] > 0.5
    assert validate(model, deltas, task.new, [], {})["reliability"] == 0


@pytest.mark.slow
def test_an_edit_beyond_a_bound_is_not_saved_unless_asked(mmray, demo_run, few_texts, tmp_path):
    asked = ["edit", demo_run.uri, "--suppress", "hammer", "--method", "noise", "--sigma", 9, "--keep-text", few_texts]
    asked += ["--kept", 24, "--samples", 4, "--out", tmp_path / "edit"]
    refused = mmray(*asked)
    assert refused.status == 3
    assert "not saved" in refused.err
    assert refused.err.count("\n") == 1
    assert "changes captions" in refused.out
    assert not (tmp_path / "edit" / "edit.json").exists()
    saved = mmray(*asked, "--allow-collateral")
    assert saved.status == 0, saved.err
    facts = open_edit(tmp_path / "edit").facts
    assert "image_locality" in facts["broken"]
    assert facts["validation"]["image_locality"] < 0.95
    assert facts["tries"][0]["broken"] == facts["broken"]


@pytest.mark.parametrize("method", ["noise", "scale"])
def test_what_takes_words_away_is_measured_by_whether_they_are_gone(dataset, few_texts, monkeypatch, method):
    asked = []
    monkeypatch.setattr(methods, "validate", lambda *_, gone, **__: asked.append(gone) or {})
    make_edit(dataset, [edit_settings({"suppress": "hammer", "method": method, "keep_text": few_texts, **QUICK})])
    assert asked == [True]


def test_replies_end_where_they_are_cut_off(dataset):
    short, long = (dataset.replies([Prompt("What is a dog?")], longest)[0].tokens for longest in (1, 64))
    assert len(short) == 1
    assert short[0] == long[0]


def test_replies_are_in_the_order_of_their_prompts(dataset):
    sample = dataset.read(dataset.ids())[0]
    prompts = ("What is the capital of France, and of Spain?", "Name a colour.", "What is a dog?")
    queries = [Prompt(text) for text in prompts] + [Prompt(dataset.prompt_for(sample), sample.image)]
    queries = [queries[place] for place in (0, 3, 1, 2)]
    together = dataset.replies(queries, 8)
    assert [one.prompt for one in together] == [query.prompt for query in queries]
    assert [one.tokens for one in together] == [dataset.replies([query], 8)[0].tokens for query in queries]
    assert len({one.tokens for one in together}) > 1


def test_several_words_are_patched_from_the_start(dataset, few_texts, monkeypatch):
    monkeypatch.setattr(methods, "validate", lambda *_, **__: {})
    common = {"keep_text": few_texts, "samples": 2, "kept": 8, "steps": 2}
    pairs = ({"source": "hammer", "target": "sun"}, {"source": "pizza", "target": "dog"})
    edit = make_edit(dataset, [edit_settings(pair | common) for pair in pairs])
    assert [one["method"] for one in edit.facts["tries"]] == ["patch"]
    assert len(edit.neurons) == len(set(edit.neurons)) >= len(pairs)
    task = prepare(dataset, [edit_settings(pair | common) for pair in pairs])
    one = prepare(dataset, [edit_settings(pairs[0] | common)])
    # Located ones first, of both words: what a smaller edit would have.
    assert len(set(task.neurons[:50]) & set(one.neurons[:50])) >= 25
