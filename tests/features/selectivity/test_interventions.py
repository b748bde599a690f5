"""What masks do to held-out texts: costs are those of one text alone, and zeroed neurons are those of the module."""

import pytest
import torch

from mmray.features.selectivity import logit_lens, texts
from mmray.features.selectivity.interventions import measure_interventions
from mmray.features.selectivity.logit_lens import Lens
from mmray.features.selectivity.masks import Mask, zeroed
from mmray.features.selectivity.rows import stage_rows
from mmray.features.selectivity.settings import selectivity_settings
from mmray.features.selectivity.texts import captions_of, in_batches
from mmray.models.blocks import block_of
from mmray.models.generation import caption_of, generate
from mmray.models.interventions import ablate
from mmray.models.prompting import prompt_text
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.activation_cache import forward
from mmray.neurons.model import open_image
from tests.support.labelled import LANGUAGE
from tests.support.samples import hooks, samples, settings

QUESTIONS = (("Is there a dog?", "Yes"), ("What is it?", "A cat on a chair"))


def found(count=4, **facts):
    return samples(count, language="en", questions=QUESTIONS, **facts)


def told(size):
    return selectivity_settings({"run": "none", "batch_size": size, "questions": 2})


def measured(model, some, masks, asked):
    return measure_interventions(model, some, masks, asked, settings())["measurements"]


def encoded(model, count, size):
    return in_batches(model, captions_of(model, found(count), "language", settings()), size, lambda *both: both)


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_costs_do_not_depend_on_the_batch(open_model):
    model = open_model("llava")
    mask = Mask("en", "selected", (("language", 0, 1), ("language", 1, 3)))
    one, other = (measured(model, found(), [mask], told(size)).to_pylist() for size in (1, 4))
    assert len(one) == len(other) == 2 * 4 * 2

    def key(row):
        return str((row["masked"], row["measure"], row["sample_id"]))

    for a, b in zip(sorted(one, key=key), sorted(other, key=key), strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-4)
        assert a["count"] == b["count"]
    plain, zeroed = (of(one, masked=label, measure="nll") for label in (None, "en"))
    assert [row["total"] for row in plain] != [row["total"] for row in zeroed]
    assert {row["count"] for row in of(one, measure="accuracy")} == {2.0}


def test_batches_that_do_not_fit_are_halved(open_model, monkeypatch):
    """Memory runs out under the mask, when the plain numbers of the batch are known: none of them counts twice."""
    model, mask = open_model("llava"), Mask("en", "selected", (("language", 0, 1), ("language", 1, 3)))

    def looked():
        lens = Lens(model, [mask])
        in_batches(model, captions_of(model, found(), "language", settings()), 4, lens.add)
        rows = measured(model, found(), [mask], told(4))
        counts = rows.select(["masked", "measure", "sample_id", "count"])
        return counts.sort_by([(name, "ascending") for name in counts.column_names]), lens.table().drop_columns(
            ["entropy", "shift", "tokens", "counts", "agreed"]
        )

    expected, calls = looked(), []

    def short(model, batch):
        calls.append(len(batch.tokens))
        if len(batch.tokens) > 1 and len(calls) % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    for place in (texts, logit_lens):
        monkeypatch.setattr(place, "forward", short)
    assert looked() == expected
    assert {1, 2, 4} <= set(calls)


def test_an_empty_mask_changes_nothing(open_model):
    rows = measured(open_model("llava"), found(), [Mask("en", "random", ())], told(4)).to_pylist()
    for plain, masked in zip(of(rows, masked=None), of(rows, masked="en"), strict=True):
        assert plain["total"] == masked["total"]


def test_an_answer_is_right_where_greedy_generation_begins_with_it(open_model):
    """The model's own first words are right answers, other words are not."""
    model, (sample,) = open_model("demo"), samples(1)
    question = "Is there a dog in the image?"
    (tokens,) = generate(model, [prompt_text(model, question, None)], [open_image(sample.image)])
    said = caption_of(model, tokens)[0]
    wrong = "No" if said.startswith("Yes") else "Yes"
    for answer, right in ((said, 1.0), (wrong, 0.0)):
        asked = samples(1, language="en", questions=((question, answer),))
        rows = measured(model, asked, [], told(1)).to_pylist()
        assert [row["total"] for row in of(rows, measure="accuracy")] == [right]


@pytest.mark.parametrize("module", ["vision", "projector"])
def test_a_tower_s_neurons_are_zeroed(open_model, module):
    model = open_model("llava")
    projection = model.parts.mlps(module)[-1]
    seen = []
    target = model.network.get_submodule(projection.path)
    (some,) = encoded(model, 2, 2)
    before = hooks(model.network)
    with ablate(model, [(projection.layer, 1)], module=module):
        handle = target.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        with torch.inference_mode():
            forward(model, some[1])
        handle.remove()
    assert (seen[0][..., 1] == 0).all()
    assert (seen[0][..., 0] != 0).any()
    assert hooks(model.network) == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lens_sees_every_block_of_every_family(open_model, variant):
    model = open_model(variant)
    last_layer = len(model.widths) - 1
    # Several neurons, for of those with a ReLU some are never open.
    lens = Lens(model, [Mask("en", "selected", tuple(("language", 0, unit) for unit in range(8)))])
    for some, batch in encoded(model, 2, 1):
        lens.add(some, batch)
    rows = lens.table().to_pylist()
    last = of(rows, masked=None, layer=last_layer, position="text")[0]
    assert last["agreed"] == last["n_tokens"] > 0
    assert all(row["shift"] == 0 for row in of(rows, masked=None))
    assert of(rows, masked="en", layer=last_layer, position="text")[0]["n_tokens"] == last["n_tokens"]
    # The mask is of the first layer: what it changes is there in every layer that follows.
    assert all(row["shift"] > 0 for row in of(rows, masked="en", position="text"))
    images = of(rows, masked=None, position="image")
    assert bool(images) == model.parts.image_in_sequence


def test_random_masks_have_the_shift_alone(open_model):
    model, neurons = open_model("llava"), (("language", 0, 1), ("language", 1, 3))
    lens = Lens(model, [Mask("en", control, neurons) for control in ("selected", "random")])
    for some, batch in encoded(model, 2, 2):
        lens.add(some, batch)
    rows = lens.table().to_pylist()
    selected, random = (of(rows, masked="en", control=control) for control in ("selected", "random"))
    # The same neurons here, so the same shift.
    assert [row["shift"] for row in selected] == [row["shift"] for row in random]
    assert all(row["entropy"] > 0 and row["tokens"] for row in selected)
    assert all(row["entropy"] == 0 and row["tokens"] == [] for row in random)
    table = stage_rows([lens.table()], {"language": dict(LANGUAGE)}).to_pylist()
    assert {row["entropy"] is None for row in of(table, control="random")} == {True}
    assert {row["entropy"] is None for row in of(table, control="selected") + of(table, control=None)} == {False}


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_lens_is_that_of_the_model_s_own_states(open_model, kind):
    """Entropy, agreement, tokens, and what a mask changes, of every layer, from the states that the network returns."""
    model, mask = open_model("llava"), Mask("en", "selected", (("language", 0, 1), ("language", 1, 3)))
    ((texts, batch),) = encoded(model, 1, 1)
    lens = Lens(model, [mask])
    lens.add(texts, batch)
    start = batch.caption_start[0] - 1
    (image,) = [run for run in batch.spans if run.modality == "image"]
    count = min(logit_lens.IMAGE_POSITIONS, image.stop - image.start)
    positions = {
        "text": list(range(start, start + len(texts[0].tokens))),
        "image": [image.start + number * (image.stop - image.start) // count for number in range(count)],
    }[kind]

    @torch.inference_mode()
    def states():
        seen = []
        handles = [
            block_of(model, layer).register_forward_hook(lambda *call: seen.append(call[2]))
            for layer in range(len(model.widths))
        ]
        forward(model, batch)
        for handle in handles:
            handle.remove()
        return [(state[0] if isinstance(state, tuple) else state)[0, positions] for state in seen]

    plain = states()
    with zeroed(model, mask):
        changed = states()
    for masked, layers in ((None, plain), ("en", changed)):
        logits = [model.network.lm_head(model.norm(state)).float() for state in layers]
        for layer, found in enumerate(logits):
            (row,) = of(lens.table().to_pylist(), masked=masked, layer=layer, position=kind)
            logs, best = found.log_softmax(dim=1), found.argmax(dim=1)
            shift = (layers[layer] - plain[layer]).norm(dim=1) / plain[layer].norm(dim=1)
            assert row["n_tokens"] == len(positions)
            assert row["entropy"] == pytest.approx(float(-(logs.exp() * logs).sum()), rel=1e-4)
            assert row["agreed"] == int((best == logits[-1].argmax(dim=1)).sum())
            assert row["shift"] == pytest.approx(float(shift.sum()), rel=1e-3, abs=1e-6)
            assert (row["shift"] > 0) == (masked is not None)
            assert sum(row["counts"]) == len(positions)
