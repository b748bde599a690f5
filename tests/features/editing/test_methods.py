"""What each way of editing computes, and what a learnt edit of the demo does."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mmray
from mmray.engine import Unit
from mmray.errors import InputError
from mmray.features.editing import closed_form, job, published
from mmray.features.editing.closed_form import LayerRows
from mmray.features.editing.dataset import EditDataset, departing, replaced
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.edit import Purpose
from mmray.features.editing.edit_methods import EDIT_METHODS
from mmray.features.editing.kept_answers import kept
from mmray.features.editing.locating import located, matched, sharing
from mmray.features.editing.methods import make_edit
from mmray.features.editing.resumed_forward import batched, resume, resume_all
from mmray.features.editing.settings import edit_settings
from mmray.features.editing.task import prepare
from mmray.features.editing.training import TrainingConfig, learn
from mmray.models.bans import banned_tokens
from mmray.models.generation import generate
from mmray.models.options import LONGEST
from mmray.models.prompting import prompt_text
from mmray.neurons.concepts import find_forms
from mmray.neurons.model import open_image
from mmray.runs.run import open_run
from tests.support.local_jobs import KEPT_TEXT
from tests.support.word_ban import WordBan

FEW = {"kept": 16, "samples": 4, "keep_text": KEPT_TEXT}


@pytest.fixture(scope="module")
def demo_run(demo_census):
    return open_run(demo_census(384, shard_size=200))


@pytest.fixture(scope="module")
def dataset(open_model, demo_run):
    return EditDataset(open_model("demo"), demo_run)


def row(name, **settings):
    generator = torch.Generator().manual_seed(3)
    rows, word = torch.randn(6, 16, generator=generator), torch.randn(2, 16, generator=generator)
    return LayerRows(rows, word, edit_settings({"suppress": "dog", "method": name, **settings}), generator)


def test_zeroed_rows_are_zero():
    given = row("zero")
    assert torch.equal(given.rows + closed_form.zero(given), torch.zeros(6, 16))


def test_scaled_rows_are_scaled():
    given = row("scale", factor=0.25)
    assert torch.allclose(given.rows + closed_form.scale(given), 0.25 * given.rows)


def test_projected_rows_are_blind_to_the_word_and_lose_nothing_else():
    given = row("project")
    after = given.rows + closed_form.project(given)
    assert (after @ given.word.T).abs().max() < 1e-5
    across = torch.linalg.svd(given.word)[2][2:]
    assert torch.allclose(after @ across.T, given.rows @ across.T, atol=1e-5)


def test_noise_has_the_deviation_asked_for():
    given = row("noise", sigma=0.5)
    wide = LayerRows(torch.zeros(400, 400), given.word, given.settings, given.generator)
    assert float(closed_form.noise(wide).std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({}, "--suppress"),
        ({"source": "dog"}, "together"),
        ({"source": "dog", "target": "dog"}, "same"),
        ({"suppress": "dog", "source": "dog", "target": "cat"}, "--suppress"),
        ({"suppress": "dog", "method": "magic"}, "method"),
        ({"suppress": "dog", "neurons": 0}, "neurons"),
    ],
)
def test_wrong_settings_are_one_line(wrong, word):
    with pytest.raises(InputError, match=word) as refused:
        edit_settings(wrong)
    assert "\n" not in str(refused.value)


def test_material_says_the_new_and_keeps_the_rest(dataset):
    new, rest = replaced(dataset, "hammer", "ant", 8, 0), kept(dataset, ["hammer"], 24, 0)
    for example in new:
        said = dataset.text(example.tokens[:-1])
        assert find_forms(said, frozenset({"ant"}), "en")
        assert not find_forms(said, frozenset({"hammer"}), "en")
        place, old = example.rejected
        assert example.tokens[place] != old
        assert place < example.no_repeat_from <= len(example.tokens)
    shown = set(dataset.ids(["hammer"]))
    assert {example.sample_id for example in new} <= shown
    assert len(new) > len({example.sample_id for example in new})  # further views, too
    assert len(rest) == 24
    assert not any("hammer" in dataset.text(example.tokens) for example in rest)
    with pytest.raises(InputError, match="names it in none"):
        replaced(dataset, "no such thing", "ant", 8, 0)


def test_where_the_article_changes_the_new_word_is_learnt_behind_the_old_one_too(dataset):
    pairs = replaced(dataset, "hammer", "ant", 4, 0)
    text = [dataset.text(example.tokens[:-1]) for example in pairs]
    both = [number for number, said in enumerate(text) if "an ant" in said]
    assert both
    for number in both:
        agreeing, behind = pairs[number], pairs[number + 1]
        assert text[number + 1] == text[number].replace("an ant", "a ant")
        place, token = behind.rejected
        assert dataset.text([token]) == "hammer"
        assert (agreeing.loss_from, behind.loss_from) == (0, place)
    assert all(example.loss_from == 0 for example in replaced(dataset, "hammer", "dog", 4, 0))


def test_kept_captions_are_learnt_on_as_they_were_heard(dataset):
    rest = kept(replace(dataset, caption_tokens={}, caches={}), ["ant"], 12, 5)
    model = dataset.model
    assert all(example.cache for example in rest)
    deltas = Deltas(model, [(len(model.widths) - 1, unit) for unit in range(40)])
    with torch.no_grad():
        ((recalled, rows),) = resume_all(model, rest, deltas)
        ((forward, others),) = resume_all(model, [replace(example, cache=None) for example in rows], deltas)
        order = sorted(range(len(others)), key=lambda number: rows.index(others[number]))
        apart = [forward.logits()[forward.rows == number] for number in order]
        assert torch.allclose(recalled.logits(), torch.cat(apart), atol=1e-3)
    # Greedily written: every token of it is the likeliest, the end too.
    assert torch.equal(recalled.logits().argmax(dim=1), recalled.targets)


def test_of_several_ends_the_one_that_the_model_writes_is_taught(dataset, monkeypatch):
    model = dataset.model
    own = model.tokenizer.eos_token_id
    # Another token that would end an answer comes first, as in the settings of Gemma 3 and Llama 3.
    other = next(token for token in range(5, 99) if token not in model.tokenizer.all_special_ids)
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", [other, own])
    fresh = EditDataset(model, dataset.run)
    assert fresh.end == ()
    (sample,) = fresh.read(fresh.ids(["hammer"])[:1])
    tokens = fresh.own_captions([sample])[0]
    assert fresh.example(sample, tokens, tokens).tokens == (*tokens, own)


def test_edits_of_a_worker_share_the_model(demo_run, monkeypatch):
    """Also those of several languages, whose captions of the run's samples differ."""
    seen = []
    monkeypatch.setattr(job, "make_edit", lambda dataset, _: seen.append(dataset) or SimpleNamespace(save=str))
    requests = [edit_settings({"suppress": "hammer", "language": language}) for language in ("en", "es", "en")]
    jobs = [
        job.EditJob(job.NamedEditSettings(run=demo_run.uri, name=str(number), wish=request))
        for number, request in enumerate(requests)
    ]
    for work in job.EditJob.workers(jobs, [None] * len(jobs)):
        work(Unit(1))
    assert [dataset.language for dataset in seen] == ["en", "es", "en"]
    assert len({id(dataset) for dataset in seen}) == 2
    assert len({id(dataset.model) for dataset in seen}) == 1


def test_a_caption_that_was_cut_off_teaches_no_end(dataset):
    (sample,) = dataset.read(dataset.ids(["hammer"])[:1])
    tokens = dataset.own_captions([sample])[0]
    long = (tokens * LONGEST)[:LONGEST]
    assert dataset.example(sample, tokens, tokens).tokens == (*tokens, *dataset.end)
    assert dataset.example(sample, long, long).tokens == long
    changed = departing(dataset, long, dataset.example(sample, "An image of a dog", long))
    assert dataset.end[0] not in changed.tokens
    assert changed.rejected


def test_rank_one_says_that_it_needs_captions_that_stay(dataset, tmp_path):
    nothing = tmp_path / "text.json"
    nothing.write_text('{"prompts": [], "texts": []}')
    asked = {"source": "hammer", "target": "dog", "method": "rank-one", "kept": 0, "keep_text": str(nothing)}
    with pytest.raises(InputError, match="raise --kept"):
        make_edit(dataset, [edit_settings(asked)])


def test_controls_are_of_the_same_layers(dataset, demo_run):
    neurons = located(demo_run, "hammer", 30, [6, 7])
    others = matched(dataset.model, neurons, 0)
    assert sorted(layer for layer, _ in neurons) == sorted(layer for layer, _ in others)
    assert len(set(others)) == 30
    # Half of a layer: drawn from all of it, a control would hold a quarter of these neurons.
    half = [(7, unit) for unit in range(0, dataset.model.widths[7], 2)]
    assert set(matched(dataset.model, half, 0)) == {(7, unit) for unit in range(1, dataset.model.widths[7], 2)}
    with pytest.raises(InputError, match="a layer has too few others; lower --neurons"):
        matched(dataset.model, [*half, (7, 1)], 0)


def test_captions_that_share_neurons_are_those_whose_nouns_they_write_the_most_first(demo_run):
    neurons = set(located(demo_run, "hammer", 30, [6, 7]))
    reached = {}
    for row in demo_run.table("occurrences").to_pylist():
        scores = [max(one["score"], 0) for one in row["neurons"] if (one["layer"], one["unit"]) in neurons]
        reached[row["sample_id"]] = max(sum(scores), reached.get(row["sample_id"], 0))
    found = sharing(demo_run, list(neurons))
    assert set(found) == {name for name, score in reached.items() if score > 0} < set(reached)
    amounts = [reached[name] for name in found]
    assert amounts == pytest.approx(sorted(amounts, reverse=True), rel=1e-6)


def test_a_banned_word_is_not_written(dataset):
    model = dataset.model
    sample = dataset.read(dataset.ids(["hammer"])[:1])
    images, prompts = [open_image(sample[0].image)], [prompt_text(model, None, "en")]
    before = generate(model, prompts, images)
    assert "hammer" in dataset.text(before[0])
    ban = WordBan(model, ("hammer",), (Purpose("suppress", "hammer"),))
    with ban.applied(model):
        assert "hammer" not in dataset.text(generate(model, prompts, images)[0])
    assert generate(model, prompts, images) == before
    assert banned_tokens(model, ("hammer",))


@pytest.mark.slow
def test_a_swap_swaps_and_leaves_others_alone(dataset):
    settings = {"source": "hammer", "target": "dog", "kept": 96, "samples": 12, "neurons": 50, "keep_text": KEPT_TEXT}
    edit = make_edit(dataset, [edit_settings(settings)])
    model = dataset.model
    # The same rows, added to as many other neurons of the layer.
    others = matched(model, list(zip(edit.layer.tolist(), edit.unit.tolist(), strict=True)), 0)
    control = replace(edit, unit=torch.tensor([unit for _, unit in others]))
    assert edit.facts["rows_changed"] <= 50
    own = dataset.read(edit.purpose.samples)
    others = [s for s in dataset.read(dataset.ids()) if "hammer" not in s.objects][-64:]

    def say(samples):
        prompts, images = [prompt_text(model, None, "en")] * len(samples), [open_image(s.image) for s in samples]
        return [dataset.text(tokens) for tokens in generate(model, prompts, images)]

    before = say(others)
    with edit.applied(model):
        swapped, after = say(own), say(others)
    assert sum("dog" in text and "hammer" not in text for text in swapped) >= 0.9 * len(own)
    assert sum(map(str.__eq__, before, after)) >= 0.9 * len(others)
    with control.applied(model):
        moved = say(own)
    assert sum("dog" in text and "hammer" not in text for text in moved) <= 0.5 * len(own)


def test_learning_goes_on_until_new_answers_are_taken_in(dataset):
    task = prepare(dataset, [edit_settings({"source": "hammer", "target": "dog", **FEW})])
    for steps, rounds in ((1, 2), (15, 5)):
        deltas = Deltas(dataset.model, task.neurons)
        config = TrainingConfig(steps=steps, rounds=rounds)
        losses = learn(dataset.model, deltas, task.new, task.kept.learned, config)
        with torch.no_grad():
            behind = [resume(dataset.model, batch, deltas) for batch, _ in batched(dataset.model, task.new)]
            wrong = [part.rows[part.logits(deltas).argmax(1) != part.targets].unique() for part in behind]
        assert losses[-1] < losses[0]
        # One step a round is too few, and fifteen enough: so both ends are seen.
        assert (sum(map(len, wrong)) <= 0.05 * len(task.new)) == (steps == 15)


def test_new_words_lead_by_more_where_they_are_to(dataset):
    task = prepare(dataset, [edit_settings({"source": "hammer", "target": "dog", **FEW})])
    smallest = []
    for lead in (0.0, 5.0):
        deltas = Deltas(dataset.model, task.neurons)
        learn(dataset.model, deltas, task.new, task.kept.learned, TrainingConfig(margin=lead))
        leads = []
        for batch, rows in batched(dataset.model, task.new):
            with torch.no_grad():
                said = resume(dataset.model, batch, deltas).logits(deltas)
            said = said.split([len(example.tokens) for example in rows])
            for logits, example in zip(said, rows, strict=True):
                place, old = example.rejected
                leads.append(float(logits[place, example.tokens[place]] - logits[place, old]))
        smallest.append(min(leads))
    assert smallest[1] > smallest[0] + 1
    assert smallest[1] > 5


@pytest.mark.slow
@pytest.mark.parametrize("method", EDIT_METHODS)
def test_every_method_gives_an_edit(dataset, method, monkeypatch):
    monkeypatch.setattr(published, "STEPS", 2)
    pytest.importorskip("peft" if method == "lora" else "torch", reason="the extra `baselines` is not installed")
    made = make_edit(
        dataset,
        [edit_settings({"suppress": "hammer", "method": method, **FEW, "steps": 2, "factor": 0.5})],
    )
    assert made.purpose.source == "hammer"
    assert bool(made.delta.abs().sum() > 0)
    names = [name for name, _ in dataset.model.network.named_modules()]
    assert not any("lora" in name for name in names)
    with made.applied(dataset.model):
        pass


def test_the_public_call_edits_a_run(demo_run, tmp_path):
    edit = mmray.edit(demo_run, suppress="hammer", method="zero", neurons=10, **FEW)
    edit.save(tmp_path / "edit")
    assert mmray.open_edit(tmp_path / "edit").neurons == edit.neurons
    with pytest.raises(InputError, match="no concept"):
        mmray.edit(demo_run, source="unheard", target="dog")
