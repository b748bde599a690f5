"""Visual questions under masks: every position counts, replies are scored, and modules are zeroed alone or together."""

import pytest
import torch

from mmray.errors import InputError, ShardError
from mmray.features.selectivity.interventions import measure_interventions
from mmray.features.selectivity.masks import Mask, joined, zeroed
from mmray.features.selectivity.settings import selectivity_settings
from mmray.features.selectivity.texts import captions_of, in_batches
from mmray.models.capture import capture_activations
from mmray.models.generation import caption_of, generate
from mmray.models.interventions import ablate
from mmray.models.options import TEXT_BRANCH
from mmray.models.prompting import prompt_text
from mmray.neurons.activation_cache import forward
from mmray.neurons.model import open_image
from mmray.objects.answer_scores import SCORES
from tests.support.label_sums import labelled, totals_of
from tests.support.samples import hooks, samples, settings

PEOPLE = ("dog",) * 7 + ("cat",) * 3
NEURONS = {
    "language": (("language", 0, 1), ("language", 1, 3)),
    "vision": (("vision", 0, 2), ("vision", 1, 5)),
    "projector": (("projector", 0, 4),),
}


def asked(count: int = 3) -> list:
    """Return samples whose captions answer questions of different lengths."""
    found = samples(count, language="en", answers=PEOPLE)
    return [
        type(one)(**(vars(one) | {"question": "What is it? " * number, "caption": "dog"}))
        for number, one in enumerate(found, 1)
    ]


def loop_counts(model, module, found, own):
    """Return per neuron of a module how many of each sample's positions have an open gate, one sample at a time."""
    total = 0
    for said, batch in in_batches(model, captions_of(model, found, "language", settings()), 1, lambda *both: both):
        layers: dict[int, torch.Tensor] = {}
        mlps = model.parts.mlps(module)
        with (
            torch.inference_mode(),
            capture_activations(model.network, mlps, lambda *seen, layers=layers: layers.update({seen[0]: seen[2]})),
        ):
            forward(model, batch)
        if said[0].label == own:
            total = total + torch.cat([(gate.flatten(0, -2) > 0).sum(dim=0) for gate in layers.values()])
    return total


@pytest.mark.parametrize(
    ("variant", "module"),
    [("llava", "language"), ("instructblip_vicuna", TEXT_BRANCH), ("instructblip_vicuna", "language")],
)
def test_every_position_counts(open_model, variant, module):
    """Image, question and answer: all positions of a sequence without padding, also where batches have some."""
    model = open_model(variant)
    found = [
        type(one)(**(vars(one) | {"question": "What is it? " * number})) for number, one in enumerate(labelled(4), 1)
    ]
    totals, replicates = totals_of(model, found, module=module, count="all", size=4)
    for place, label in enumerate(replicates.labels):
        expected = loop_counts(model, module, found, label)
        # A number near zero may fall on either side of it where another sample shares the batch.
        torch.testing.assert_close(totals["active"].sums[0, :, place], expected.double(), atol=2, rtol=0)
    lengths = [
        (text.label, batch.positions if module == "language" else batch.inputs["qformer_input_ids"].shape[1])
        for (text,), batch in in_batches(
            model, captions_of(model, found, "language", settings()), 1, lambda *both: both
        )
    ]
    for place, label in enumerate(replicates.labels):
        assert totals["active"].tokens[0, place] == sum(length for own, length in lengths if own == label)


def test_modules_are_zeroed_together(open_model):
    model, (sample,) = open_model("llava"), asked(1)
    masks = [Mask("x", "selected", neurons, module) for module, neurons in NEURONS.items()]
    (together,) = joined(masks)
    assert (together.module, set(together.neurons)) == ("all", {one for own in NEURONS.values() for one in own})
    ((_, batch),) = in_batches(model, captions_of(model, [sample], "language", settings()), 1, lambda *both: both)
    before = hooks(model.network)
    with torch.inference_mode():
        with zeroed(model, together):
            found = model.network(**batch.to(model.device, model.network.dtype)).logits
        with (
            ablate(model, [own[1:] for own in NEURONS["vision"]], module="vision"),
            ablate(model, [own[1:] for own in NEURONS["projector"]], module="projector"),
            ablate(model, [own[1:] for own in NEURONS["language"]]),
        ):
            expected = model.network(**batch.to(model.device, model.network.dtype)).logits
        with zeroed(model, None):
            plain = model.network(**batch.to(model.device, model.network.dtype)).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain)
    assert hooks(model.network) == before


def test_the_question_s_branch_matters_up_to_its_last_block(open_model):
    model = open_model("instructblip_vicuna")
    ((_, batch),) = in_batches(model, captions_of(model, asked(1), "language", settings()), 1, lambda *both: both)
    inputs = batch.to(model.device, model.network.dtype)
    layers = model.parts.mlps(TEXT_BRANCH)
    with torch.inference_mode():
        plain = model.network(**inputs).logits
        for layer, mlp in enumerate(layers):
            mask = Mask("x", "selected", tuple((TEXT_BRANCH, layer, unit) for unit in range(mlp.width)), TEXT_BRANCH)
            with zeroed(model, mask):
                same = torch.equal(model.network(**inputs).logits, plain)
            assert same == (layer == len(layers) - 1)


@pytest.mark.parametrize("name", ["vqa", "anls", "exact"])
def test_replies_are_scored_against_all_answers(open_model, name):
    """By hand: one prompt at a time, with the same neurons zeroed."""
    model, found = open_model("llava"), asked()
    masks = [Mask("en", "selected", neurons, module) for module, neurons in NEURONS.items()]
    wanted = selectivity_settings({"run": "none", "accuracy": [name], "longest": 4, "batch_size": 2})
    census = settings(prompt="Shortly.")
    tables = measure_interventions(model, found, masks, wanted, census)
    rows = {(row["module"], row["sample_id"]): row for row in tables["answers"].to_pylist()}
    assert len(rows) == len(found) * (1 + len(masks))
    for mask in (None, *masks):
        for sample in found:
            prompt = prompt_text(model, f"{sample.question}\nShortly.", "en")
            with zeroed(model, mask):
                (tokens,) = generate(model, [prompt], [open_image(sample.image)], 4)
            row = rows[mask and mask.module, sample.sample_id]
            assert row["reply"] == caption_of(model, tokens)[0].strip()
            assert row["question"] == sample.question
            assert row["score"] == SCORES[name].judge(sample.question, row["reply"], PEOPLE)
    accuracy = [row for row in tables["measurements"].to_pylist() if row["measure"] == "accuracy"]
    assert {(row["module"], row["sample_id"]): row["total"] for row in accuracy} == {
        key: row["score"] for key, row in rows.items()
    }


def test_a_label_has_its_own_score(open_model):
    wanted = selectivity_settings({"run": "none", "accuracy": ["exact", "es=anls", "fr=begins"], "longest": 2})
    assert [wanted.score_of(label) for label in ("en", "es", "fr")] == ["exact", "anls", "begins"]
    tables = measure_interventions(open_model("llava"), [*labelled_questions()], [], wanted, settings())
    measured = {row["label"] for row in tables["measurements"].to_pylist() if row["measure"] == "accuracy"}
    # No reply is written where the answer is read.
    assert (measured, set(tables["answers"]["label"].to_pylist())) == ({"en", "es", "fr"}, {"en", "es"})


def labelled_questions():
    for one in labelled(4):
        yield type(one)(**(vars(one) | {"question": "What?", "answers": PEOPLE, "caption": "dog"}))


def test_a_sample_that_can_t_be_scored_fails_its_shard(open_model):
    (sample,) = samples(1, language="en", question="What?", answers=("dog",))
    wanted = selectivity_settings({"run": "none", "accuracy": ["vqa"], "longest": 2})
    with pytest.raises(ShardError, match="sample s0: VQA accuracy needs the answers of several people"):
        measure_interventions(open_model("llava"), [sample], [], wanted, settings())


def test_an_unknown_score_is_refused():
    with pytest.raises(InputError, match="unknown score 'bleu'"):
        selectivity_settings({"run": "none", "accuracy": ["en=bleu"]})
