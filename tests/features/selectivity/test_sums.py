"""One pass over samples: sums by label are those of plain loops, and the census's own."""

import numpy as np
import pytest
import torch

from mmray.errors import ShardError
from mmray.features.selectivity import sums
from mmray.features.selectivity.replicates import draw
from mmray.features.selectivity.selection import add_up, totals_of_activity
from mmray.features.selectivity.settings import selectivity_settings
from mmray.features.selectivity.sums import STEPS, LabelSums
from mmray.features.selectivity.texts import captions_of, in_batches, token_positions
from mmray.models.prompting import prompt_text
from mmray.neurons.scoring import score_batch
from tests.support.label_sums import labelled, totals_of
from tests.support.samples import analyse, merged, samples
from tests.support.samples import settings as told


@pytest.mark.parametrize("modality", ["text", "image"])
def test_activity_is_the_census_s(open_model, modality):
    model, found = open_model("llava"), labelled()
    totals, replicates = totals_of(model, found, count="caption" if modality == "text" else modality)
    rows = merged(model, [analyse(model, found)])["activity"]
    rows = rows.filter(np.array([kind == "language" for kind in rows["label_kind"].to_pylist()]))
    counted = totals_of_activity(rows, replicates.labels, modality, sum(model.widths))
    assert torch.equal(totals["active"].tokens[0], counted["active"].tokens[0])
    # A number near zero may fall on either side of it where another sample shares the batch.
    torch.testing.assert_close(totals["active"].sums[0], counted["active"].sums[0], atol=2, rtol=0)
    torch.testing.assert_close(totals["squares"].sums[0], counted["squares"].sums[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("captions", ["dataset", "generate"])
def test_texts_follow_the_census_s_prefix(open_model, captions):
    """A prefix that a caption of the data has is not repeated; what the model wrote always follows it."""
    model, (first, second) = open_model("llava"), samples(2, language="en")
    prefix = "An image of"
    assert first.caption.startswith(prefix)
    said = captions_of(model, [first, second], "language", told(prefix=prefix, captions=captions))
    plain = prompt_text(model, None, "en")
    assert [text.prompt for text in said] == [
        plain if captions == "dataset" else f"{plain} {prefix}",
        f"{plain} {prefix}",
    ]


def test_activity_behind_a_prefix_is_the_census_s(open_model):
    model, found = open_model("llava"), labelled()
    plain, _ = totals_of(model, found)
    totals, replicates = totals_of(model, found, census=told(prefix="An image of"))
    rows = merged(model, [analyse(model, found, prefix="An image of")])["activity"]
    rows = rows.filter(np.array([kind == "language" for kind in rows["label_kind"].to_pylist()]))
    counted = totals_of_activity(rows, replicates.labels, "text", sum(model.widths))
    torch.testing.assert_close(totals["squares"].sums[0], counted["squares"].sums[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain["squares"].sums[0], counted["squares"].sums[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("variant", "module"), [("llava", "vision"), ("llava", "projector"), ("mllama", "vision")])
def test_a_tower_s_activity_is_the_census_s(open_model, variant, module):
    model, found = open_model(variant), labelled()[1::2]
    totals, replicates = totals_of(model, found, module=module, size=2)
    part = analyse(model, found, module=module)["activity"].to_pylist()
    for place, label in enumerate(replicates.labels):
        (row,) = [r for r in part if (r["module"], r["label_kind"], r["label"]) == (module, "language", label)]
        assert totals["active"].tokens[0, place] == row["n_tokens"]
        np.testing.assert_allclose(totals["active"].sums[0, :, place], row["n_active"], atol=2)


@pytest.mark.parametrize("size", [1, 8])
def test_contributions_are_those_of_a_loop(open_model, size):
    model, found = open_model("llava"), labelled()
    totals, replicates = totals_of(model, found, method="contribution", size=size)
    expected = torch.zeros(sum(model.widths), len(replicates.labels), dtype=torch.float64)
    tokens = torch.zeros(len(replicates.labels))
    for (said,), batch in in_batches(model, captions_of(model, found, "language", told()), 1, lambda *both: both):
        scored = score_batch(model, batch, token_positions(batch, [said]), folded=True)
        label = replicates.labels.index(said.label)
        expected[:, label] += torch.cat(scored.scores, dim=1).double().sum(dim=0)
        tokens[label] += len(said.tokens)
    assert torch.equal(totals["contribution"].tokens[0], tokens.double())
    torch.testing.assert_close(totals["contribution"].sums[0], expected, rtol=1e-3, atol=1e-4)


def test_replicates_add_up_to_the_whole(open_model):
    """Shuffling labels moves sums between labels and changes no total; the course's steps are all tokens."""
    totals, _ = totals_of(open_model("llava"), labelled(), method="contribution", steer="en:es")
    by_replicate = totals["contribution"].sums.sum(dim=2)
    torch.testing.assert_close(by_replicate[1], by_replicate[0])
    assert not torch.allclose(totals["contribution"].sums[1], totals["contribution"].sums[0])
    steps = [totals[f"course {number:02d}"].tokens[0] for number in range(STEPS) if f"course {number:02d}" in totals]
    assert torch.equal(sum(steps), totals["contribution"].tokens[0])


def equal(one, other):
    assert one.keys() == other.keys()
    for name, totals in one.items():
        assert torch.equal(totals.tokens, other[name].tokens)
        torch.testing.assert_close(totals.sums, other[name].sums, rtol=1e-3, atol=1e-3)


def test_images_of_different_sizes_are_counted_alone_in_towers(open_model):
    together, alone = (totals_of(open_model("llava_next"), labelled(), module="vision", size=n)[0] for n in (4, 1))
    assert torch.equal(together["active"].tokens, alone["active"].tokens)
    torch.testing.assert_close(together["squares"].sums, alone["squares"].sums, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["lape", "contribution"])
def test_a_batch_that_does_not_fit_is_halved(open_model, monkeypatch, method):
    """Memory runs out in the middle, where some quantities of the batch are known: nothing counts twice."""
    model, found = open_model("llava"), labelled()
    settings = {"method": method, "steer": "en:es"}
    expected, _ = totals_of(model, found, size=1, **settings)

    def short(layers, parts, whole=sums._summed):
        if len(parts) > 2 and len(layers) == len(model.widths):
            short.refused += 1
            if short.refused % 2 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(layers, parts)

    short.refused = 0
    monkeypatch.setattr(sums, "_summed", short)
    found, _ = totals_of(model, found, size=8, **settings)
    assert short.refused
    equal(found, expected)


def test_a_text_that_does_not_fit_alone_is_named(open_model, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sums, "forward", never)
    with pytest.raises(ShardError, match=r"sample s\d: CUDA out of memory"):
        totals_of(open_model("llava"), labelled())


def test_text_alone_is_counted_too(open_model):
    model, found = open_model("llava"), labelled(image=None)
    totals, _ = totals_of(model, found)
    assert totals["active"].tokens[0].sum() > 0


def test_counts_are_committed_whole_and_in_half_the_bytes(open_model):
    """In any number of parts they add up to the same, to the bit; a part's rows of activity are four bytes a neuron."""
    model, found = open_model("llava"), labelled()
    replicates = draw({s.sample_id: s.language for s in found}, 2, 2, 0)
    texts = captions_of(model, found, "language", told())
    parts = []
    for some in (texts[:3], texts[3:], texts):
        added = LabelSums(model, selectivity_settings({"run": "none"}), replicates)
        in_batches(model, some, 1, added.add)
        parts.append(added.table())
    cut, whole = (add_up(some, replicates.labels)["active"] for some in (parts[:2], parts[2:]))
    assert torch.equal(cut.sums, whole.sums)
    for row in parts[2].to_pylist():
        assert len(row["values"]) == sum(model.widths) * (4 if row["quantity"] == "active" else 8)
