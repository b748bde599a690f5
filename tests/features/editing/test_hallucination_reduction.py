"""What the demo claims and is not there: found, put right, located in contrast, and unlearnt."""

import shutil
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from mmray.errors import InputError
from mmray.features.editing.dataset import EditDataset
from mmray.features.editing.divergence import contrasting, divergence
from mmray.features.editing.locating import probed
from mmray.features.editing.methods import make_edit
from mmray.features.editing.reduction_samples import hallucinations, own_captions, pairs_of, wordings
from mmray.features.editing.settings import edit_settings
from mmray.features.editing.training import log_likelihoods
from mmray.models.generation import generate
from mmray.models.parts import output_rows
from mmray.neurons.model import open_image
from mmray.runs.run import open_run
from tests.support.local_jobs import KEPT_TEXT, write_table
from tests.support.samples import weights


@pytest.fixture(scope="module")
def dataset(open_model, demo_census):
    return EditDataset(open_model("demo"), open_run(demo_census(384, shard_size=200)))


@pytest.fixture(scope="module")
def captions(dataset):
    return list(own_captions(dataset, 10**6, 0))


@pytest.fixture(scope="module")
def found(dataset):
    return hallucinations(dataset, 8, 48, 0)


def test_what_is_wrong_and_what_is_missed_is_a_matter_of_the_objects(captions):
    assert len(captions) == 384
    for one in captions:
        named = {mention.concept for mention in one.mentions}
        assert {mention.concept for mention in one.wrong} == named - one.present
        assert set(one.missed) == one.present - named
        assert all(one.caption[m.start : m.stop].casefold().startswith(m.concept[:3]) for m in one.mentions)


def test_a_pair_is_a_context_and_what_is_claimed_with_it(captions):
    pairs = pairs_of(captions)
    assert pairs
    for context, word in pairs:
        claims = [one for one in captions if context in one.present and word in {m.concept for m in one.wrong}]
        assert len(claims) >= 3
        absent = [one for one in captions if context in one.present and word not in one.present]
        assert len(claims) >= 0.1 * len(absent)
    # Where the word is always right, it is none.
    words = {word for _, word in pairs}
    right = [one for one in captions if not words & {m.concept for m in one.wrong}]
    assert not {word for _, word in pairs_of(right)} & words


def test_new_captions_name_what_is_there_and_leave_what_was_said_at_one_place(dataset, captions, found):
    by_id = {one.sample.sample_id: one for one in captions}
    for example in found.new:
        one = by_id[example.sample_id]
        named = {mention.concept for mention in dataset.mentions(dataset.text(example.tokens[:-1]))}
        assert named <= one.present
        assert named >= {m.concept for m in one.mentions} & one.present
        place, said = example.rejected
        assert (*one.tokens, *dataset.end)[:place] == example.tokens[:place]
        assert (*one.tokens, *dataset.end)[place] == said != example.tokens[place]


def test_nothing_is_said_instead_where_the_data_has_no_caption(dataset, captions):
    """A caption of which all is wrong leaves no wording, rather than the empty caption."""
    one = next(one for one in captions if one.mentions)
    without = replace(one, sample=replace(one.sample, caption=""), present=frozenset())
    assert "" not in wordings(dataset, without)


def test_guards_say_a_hallucinated_word_where_it_is_right_and_kept_captions_have_nothing_wrong(
    dataset, captions, found
):
    by_id = {one.sample.sample_id: one for one in captions}
    words = {word for _, word in found.pairs}
    for example in [*found.guards, *found.keep]:
        one = by_id[example.sample_id]
        assert not one.wrong
        assert example.tokens == (*one.tokens, *dataset.end)
    assert all(words & {m.concept for m in by_id[e.sample_id].mentions} for e in found.guards)
    assert not {e.sample_id for e in found.guards} & {e.sample_id for e in found.keep}
    assert len(found.keep) == 48


def test_the_likelihood_is_highest_for_what_the_model_itself_says(dataset, found):
    written = [(dataset.samples[e.sample_id], dataset.caption_tokens[e.sample_id]) for e in found.new[:6]]
    own = [dataset.example(sample, tokens, tokens) for sample, tokens in written]
    assert all(
        a > b
        for a, b in zip(log_likelihoods(dataset.model, own), log_likelihoods(dataset.model, found.new), strict=False)
    )


def test_located_neurons_are_those_of_the_highest_contrast(dataset, found):
    model, last = dataset.model, len(dataset.model.widths) - 1
    neurons = contrasting(model, found.new, [], 5, [last])
    assert {layer for layer, _ in neurons} == {last}
    activation = divergence(model, found.new, last)
    table = model.network.lm_head.weight.float()
    said = [e.rejected[1] for e in found.new]
    wanted = [e.tokens[e.rejected[0]] for e in found.new]
    rows = model.network.get_submodule(model.projections[last].path).weight.float().T
    # The batches sort answers by length, the mean does not care.
    order = sorted(range(len(said)), key=lambda n: len(found.new[n].tokens))
    direction = table[[said[n] for n in order]] - table[[wanted[n] for n in order]]
    mean = (activation * (direction @ rows.T)).mean(dim=0)
    assert [unit for _, unit in neurons] == mean.topk(5).indices.tolist()
    # What raises the word as much where it is right stands out no more.
    assert contrasting(model, found.new, found.new, 5, [last]) != neurons


@pytest.mark.slow
def test_an_edit_takes_the_hallucination_away_and_leaves_what_is_right(dataset, found):
    edit = make_edit(
        dataset,
        [
            edit_settings(
                {"reduce_hallucination": True, "samples": 16, "kept": 96, "neurons": 150, "keep_text": KEPT_TEXT}
            )
        ],
    )
    assert edit.purpose.pairs == found.pairs
    assert edit.purpose.kind == "hallucination"

    def say(examples):
        prompts, images = (
            [e.prompt for e in examples],
            [open_image(dataset.samples[e.sample_id].image) for e in examples],
        )
        return [tuple(tokens) for tokens in generate(dataset.model, prompts, images)]

    with edit.applied(dataset.model):
        new, guards = say(found.new), say(found.guards)
    words = set(edit.purpose.unwanted)
    rights = {e.sample_id: dataset.present(dataset.samples[e.sample_id]) for e in found.new}
    wrong = sum(
        bool(words & {m.concept for m in dataset.mentions(dataset.text(tokens))} - rights[e.sample_id])
        for e, tokens in zip(found.new, new, strict=True)
    )
    assert wrong <= 0.1 * len(new)
    kept = sum(words & {m.concept for m in dataset.mentions(dataset.text(tokens))} != set() for tokens in guards)
    assert kept >= 0.9 * len(guards)


def test_a_model_that_claims_nothing_wrong_is_refused(dataset, monkeypatch):
    right = [one for one in own_captions(dataset, 10**6, 0) if not one.wrong]
    monkeypatch.setattr("mmray.features.editing.reduction_samples.own_captions", lambda *_: iter(right))
    with pytest.raises(InputError, match="claims nothing") as refused:
        hallucinations(dataset, 8, 48, 0)
    assert "\n" not in str(refused.value)


@pytest.fixture
def probed_run(dataset, tmp_path):
    """The run with a probe's table: two neurons do more where a mention is wrong, and one does less."""
    folder = shutil.copytree(dataset.run.uri, tmp_path / "run")
    last = len(dataset.model.widths) - 1
    rows = [
        {"layer": layer, "unit": unit, "neuron": f"L{layer}.u{unit}", "weight": weight}
        for layer, unit, weight in ((0, 3, 0.2), (last, 5, -0.9), (last, 7, 0.5))
    ]
    schema = pa.schema([("layer", pa.int32()), ("unit", pa.int32()), ("neuron", pa.string()), ("weight", pa.float64())])
    write_table(folder, "hallucination_neurons", pa.Table.from_pylist(rows, schema))
    return open_run(folder), last


def test_neurons_of_the_probe_are_taken_by_weight(probed_run, dataset):
    run, last = probed_run
    layers = range(last + 1)
    assert probed(run, 2, layers, raised=False) == [(last, 5), (last, 7)]
    assert probed(run, 9, layers, raised=True) == [(last, 7), (0, 3)]
    assert probed(run, 9, [last], raised=True) == [(last, 7)]
    with pytest.raises(InputError, match="raise --layers"):
        probed(run, 9, [1], raised=True)
    with pytest.raises(InputError, match="mmray hallucination"):
        probed(dataset.run, 9, layers, raised=True)
    with pytest.raises(InputError, match="is for --reduce-hallucination"):
        edit_settings({"suppress": "dog", "by": "probe"})


@pytest.mark.slow
def test_an_edit_scales_the_rows_of_what_does_more_at_mistakes_and_is_undone(probed_run, dataset):
    run, last = probed_run
    sizes = {"samples": 4, "kept": 8, "layers": last + 1, "keep_text": KEPT_TEXT}
    request = edit_settings({"reduce_hallucination": True, "by": "probe", "method": "scale", "factor": 0.25, **sizes})
    known = EditDataset(dataset.model, run, caption_tokens=dict(dataset.caption_tokens), ends=dataset.ends.copy())
    edit = make_edit(known, [request])
    found = dict(zip(zip(edit.layer.tolist(), edit.unit.tolist(), strict=True), edit.delta, strict=True))
    assert set(found) == {(0, 3), (last, 7)}
    before = weights(dataset.model)
    for (layer, unit), delta in found.items():
        row = output_rows(dataset.model.network, dataset.model.projections[layer])[unit].clone()
        torch.testing.assert_close(delta, -0.75 * row)
        with edit.applied(dataset.model):
            torch.testing.assert_close(
                output_rows(dataset.model.network, dataset.model.projections[layer])[unit], 0.25 * row
            )
    assert weights(dataset.model) == before
