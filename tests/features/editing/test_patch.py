"""Idle neurons that are rewritten: what the edit says it does is what the edited network does, and only at the word."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmray.errors import InputError
from mmray.features.editing import methods
from mmray.features.editing.checkpoint import write_checkpoint
from mmray.features.editing.dataset import EditDataset, Example
from mmray.features.editing.edit import Purpose, WeightEdit, open_edit
from mmray.features.editing.methods import make_task_edit
from mmray.features.editing.patch import Detectors, Patch
from mmray.features.editing.resumed_forward import resume_all
from mmray.features.editing.settings import edit_settings
from mmray.features.editing.task import prepare
from mmray.features.evaluation.last_layer import LastLayer
from mmray.features.evaluation.queries import Query
from mmray.features.evaluation.teacher_forced_states import StateReader
from mmray.models.loading import load
from mmray.models.prompting import prompt_text
from mmray.runs.run import open_run
from tests.support.samples import logits, picture, png, weights

UNITS = torch.tensor([4, 9])


def patch_of(model, seed=0):
    """Return two neurons of the last layer that read and write at random."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.network.get_output_embeddings().weight.shape[1]
    task = SimpleNamespace(model=model, curvature=SimpleNamespace(fisher=torch.eye(hidden)))
    directions = torch.randn(2, hidden, generator=generator) / hidden
    detectors = Detectors(directions, torch.tensor([0.5, 0.4]), torch.ones(hidden) / hidden, UNITS)
    deltas = Patch(task, detectors, 0.5)
    for (parameters,) in deltas.parameters.values():
        parameters.data = 0.1 * torch.randn(parameters.shape, generator=generator)
    return deltas


def edit_of(model, deltas):
    (layer,) = deltas.units
    purpose = Purpose("swap", "dog", "cat", samples=("s1",))
    layers = torch.full_like(UNITS, layer)
    rows = deltas.rows(layer).detach()
    return WeightEdit(layers, UNITS, rows, (purpose,), model.digest, {}, {"seconds": 1.0}, deltas.inputs)


@pytest.mark.parametrize("variant", ["llava", "blip2_opt", "blip2_t5", "gemma3", "llava_next"])
def test_learning_sees_what_the_edited_network_does(open_model, variant):
    model = open_model(variant)
    prompt, image = prompt_text(model, None, "en"), png(picture(1))
    example = Example(prompt, image, (20, 21, 22, 23), sample_id="s1")
    deltas = patch_of(model)
    edit, before = edit_of(model, deltas), weights(model)
    ((part, _),) = resume_all(model, [example], deltas)
    expected, plain = part.logits(deltas), part.logits()
    torch.testing.assert_close(part.shaped_by(deltas).logits(deltas), expected, rtol=1e-4, atol=1e-3)
    with edit.applied(model):
        assert weights(model) != before
        ((edited, _),) = resume_all(model, [example], deltas)
        torch.testing.assert_close(edited.logits(), expected, rtol=1e-4, atol=1e-3)
    assert weights(model) == before
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["llava", "blip2_opt"])
def test_evaluation_computes_the_states_that_a_forward_gives(open_model, variant):
    model = open_model(variant)
    reader = StateReader(model, 4)
    queries = [Query("s1", prompt_text(model, None, "en"), picture(1), all_positions=True)]
    replies = [[20, 21, 22, 23]]
    edit = edit_of(model, patch_of(model))
    (before,) = reader.states_along(queries, replies)
    last = LastLayer.of(reader, edit)
    with edit.applied(model):
        found = last.after(before, all_positions=True)
        (forward,) = reader.states_along(queries, replies)
    assert last.agrees(found, forward)
    assert not last.agrees(before, forward)
    assert torch.equal(found.top, forward.top)
    # An edit that rewrites what neurons read needs what they read.
    assert last.after(replace(before, entered=None), all_positions=False) is None


def test_it_is_written_and_read_and_is_in_a_checkpoint(open_model, tmp_path):
    model = open_model("llava")
    edit = edit_of(model, patch_of(model))
    edit.save(tmp_path / "edit")
    read = open_edit(tmp_path / "edit")
    assert torch.equal(read.inputs, edit.inputs)
    assert "the rows that the neuron reads" in (tmp_path / "edit" / "README.md").read_text()
    write_checkpoint(model, read, tmp_path / "checkpoint")
    with edit.applied(model):
        expected = logits(model)
    torch.testing.assert_close(logits(load(str(tmp_path / "checkpoint"))), expected)
    assert not torch.equal(expected, logits(model))


def test_sums_keep_what_neurons_read(open_model):
    model = open_model("llava")
    patch = edit_of(model, patch_of(model))
    other = replace(patch, unit=UNITS + 1, inputs=None)
    with (patch + other).applied(model):
        together = logits(model)
    with patch.applied(model), other.applied(model):
        torch.testing.assert_close(logits(model), together)
    assert torch.equal((other + patch).delta, (patch + other).delta)
    for one, two in ((patch, patch), (patch, replace(other, unit=UNITS)), (replace(other, unit=UNITS), patch)):
        with pytest.raises(InputError, match="make one edit of both"):
            one + two


@pytest.fixture(scope="module")
def task(open_model, demo_census):
    dataset = EditDataset(open_model("demo"), open_run(demo_census(384, shard_size=200)))
    return prepare(dataset, [edit_settings({"source": "hammer", "target": "dog", "method": "patch", "kept": 64})])


def test_it_takes_and_is_silent_where_nothing_should_change(task):
    edit = make_task_edit(task, {}, 0.0)
    measures = edit.facts["validation"]
    assert measures["reliability"] >= 0.95
    assert measures["image_locality"] >= 0.9
    assert measures["text_only_64"] >= 0.95
    assert measures["text_only_kl"] < 1e-3
    deltas = methods.patch(task)
    (layer,) = deltas.units

    def opened(examples):
        parts = [part for part, _ in resume_all(task.model, examples, deltas)]
        return torch.cat([deltas.shaped(layer, part.activation, part.entered) for part in parts])[
            :, : len(edit.neurons)
        ]

    at_words, at_text = (opened(some).amax() for some in (task.new, task.kept.held_out["replies"]))
    assert at_text < 0.05 * at_words


def test_a_patched_neuron_is_not_idle_for_the_next_patch(task):
    edit = make_task_edit(task, {}, 0.0)
    model = task.model
    fresh = replace(task.before, detectors=None)

    def again(some):
        return [replace(one, cache=None) for one in some]

    kept = type(task.kept)(
        *({kind: again(part[kind]) for kind in part} for part in (task.kept.learned, task.kept.held_out))
    )
    with edit.applied(model):
        # Its word is another: the model says this one already.
        with pytest.raises(InputError, match="says the new words already"):
            Detectors.of(replace(task, new=again(task.new), kept=kept, before=fresh))
        others = [
            replace(one, rejected=(0, one.tokens[0]), no_repeat_from=1, tokens=(7, *one.tokens[1:]))
            for one in again(task.new)
        ]
        detectors = Detectors.of(replace(task, new=others, kept=kept, before=fresh))
    assert not set(detectors.units.tolist()) & set(edit.unit.tolist())
