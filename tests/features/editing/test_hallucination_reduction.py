"""What the demo claims and is not there: found, put right, located in contrast, and unlearnt."""

import pytest

from mmray.errors import InputError
from mmray.features.editing.dataset import EditDataset
from mmray.features.editing.divergence import contrasting, divergence
from mmray.features.editing.methods import make_edit
from mmray.features.editing.reduction_samples import hallucinations, pairs_of, tell
from mmray.features.editing.settings import edit_settings
from mmray.features.editing.training import log_likelihoods
from mmray.models.generation import generate
from mmray.neurons.model import open_image
from mmray.runs.run import open_run
from tests.support.local_jobs import census_here


@pytest.fixture(scope="module")
def material(open_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("hallucination") / "run"
    census_here("demo", "demo", out, limit=384, shard_size=200)
    return EditDataset(open_model("demo"), open_run(out))


@pytest.fixture(scope="module")
def told(material):
    return list(tell(material))


@pytest.fixture(scope="module")
def found(material):
    return hallucinations(material, 8, 48, 0)


def test_what_is_wrong_and_what_is_missed_is_a_matter_of_the_objects(told):
    assert len(told) == 384
    for one in told:
        named = {mention.concept for mention in one.mentions}
        assert {mention.concept for mention in one.wrong} == named - one.present
        assert set(one.missed) == one.present - named
        assert all(one.caption[m.start : m.stop].casefold().startswith(m.concept[:3]) for m in one.mentions)


def test_a_pair_is_a_context_and_what_is_claimed_with_it(told):
    pairs = pairs_of(told)
    assert pairs
    for context, word in pairs:
        claims = [one for one in told if context in one.present and word in {m.concept for m in one.wrong}]
        assert len(claims) >= 3
        absent = [one for one in told if context in one.present and word not in one.present]
        assert len(claims) >= 0.1 * len(absent)
    # Where the word is always right, it is none.
    words = {word for _, word in pairs}
    right = [one for one in told if not words & {m.concept for m in one.wrong}]
    assert not {word for _, word in pairs_of(right)} & words


def test_new_captions_name_what_is_there_and_leave_what_was_said_at_one_place(material, told, found):
    by_id = {one.sample.sample_id: one for one in told}
    for example in found.new:
        one = by_id[example.sample_id]
        named = {mention.concept for mention in material.named(material.text(example.tokens[:-1]))}
        assert named <= one.present
        assert named >= {m.concept for m in one.mentions} & one.present
        place, said = example.avoided
        assert (*one.tokens, material.end)[:place] == example.tokens[:place]
        assert (*one.tokens, material.end)[place] == said != example.tokens[place]


def test_guards_say_a_hallucinated_word_where_it_is_right_and_kept_captions_have_nothing_wrong(material, told, found):
    by_id = {one.sample.sample_id: one for one in told}
    words = {word for _, word in found.pairs}
    for example in [*found.guards, *found.keep]:
        one = by_id[example.sample_id]
        assert not one.wrong
        assert example.tokens == (*one.tokens, material.end)
    assert all(words & {m.concept for m in by_id[e.sample_id].mentions} for e in found.guards)
    assert not {e.sample_id for e in found.guards} & {e.sample_id for e in found.keep}
    assert len(found.keep) == 48


def test_the_likelihood_is_highest_for_what_the_model_itself_says(material, found):
    written = [(material.samples[e.sample_id], material.written[e.sample_id]) for e in found.new[:6]]
    own = [material.example(sample, tokens, tokens) for sample, tokens in written]
    assert all(
        a > b
        for a, b in zip(log_likelihoods(material.model, own), log_likelihoods(material.model, found.new), strict=False)
    )


def test_located_neurons_are_those_of_the_highest_contrast(material, found):
    model, last = material.model, len(material.model.widths) - 1
    neurons = contrasting(model, found.new, [], 5, [last])
    assert {layer for layer, _ in neurons} == {last}
    activation = divergence(model, found.new, last)
    table = model.network.lm_head.weight.float()
    said = [e.avoided[1] for e in found.new]
    wanted = [e.tokens[e.avoided[0]] for e in found.new]
    rows = model.network.get_submodule(model.projections[last].path).weight.float().T
    # The batches sort answers by length, the mean does not care.
    order = sorted(range(len(said)), key=lambda n: len(found.new[n].tokens))
    direction = table[[said[n] for n in order]] - table[[wanted[n] for n in order]]
    mean = (activation * (direction @ rows.T)).mean(dim=0)
    assert [unit for _, unit in neurons] == mean.topk(5).indices.tolist()
    # What raises the word as much where it is right stands out no more.
    assert contrasting(model, found.new, found.new, 5, [last]) != neurons


@pytest.mark.slow
def test_an_edit_takes_the_hallucination_away_and_leaves_what_is_right(material, found):
    edit = make_edit(
        material,
        [edit_settings({"reduce_hallucination": True, "samples": 16, "kept": 96, "neurons": 150, "steps": 40})],
    )
    assert edit.purpose.pairs == found.pairs
    assert edit.purpose.kind == "hallucination"

    def say(examples):
        prompts, images = (
            [e.prompt for e in examples],
            [open_image(material.samples[e.sample_id].image) for e in examples],
        )
        return [tuple(tokens) for tokens in generate(material.model, prompts, images)]

    with edit.applied(material.model):
        new, guards = say(found.new), say(found.guards)
    words = set(edit.purpose.unwanted)
    rights = {e.sample_id: material.present(material.samples[e.sample_id]) for e in found.new}
    wrong = sum(
        bool(words & {m.concept for m in material.named(material.text(tokens))} - rights[e.sample_id])
        for e, tokens in zip(found.new, new, strict=True)
    )
    assert wrong <= 0.1 * len(new)
    kept = sum(words & {m.concept for m in material.named(material.text(tokens))} != set() for tokens in guards)
    assert kept >= 0.9 * len(guards)


def test_a_model_that_claims_nothing_wrong_is_refused(material, monkeypatch):
    right = [one for one in tell(material) if not one.wrong]
    monkeypatch.setattr("mmray.features.editing.reduction_samples.tell", lambda _: iter(right))
    with pytest.raises(InputError, match="claims nothing") as refused:
        hallucinations(material, 8, 48, 0)
    assert "\n" not in str(refused.value)
