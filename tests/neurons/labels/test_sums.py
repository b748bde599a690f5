"""One pass over samples: sums by label are those of plain loops, and the census's own."""

import numpy as np
import pytest
import torch

from mmray.errors import InputError
from mmray.neurons.labels.material import batches, captions_of, token_places
from mmray.neurons.labels.replicates import draw
from mmray.neurons.labels.selecting import add_up, of_activity
from mmray.neurons.labels.settings import selectivity_settings
from mmray.neurons.labels.sums import STEPS, LabelSums
from mmray.neurons.scoring import score_batch
from tests.neurons.making import analyse, merged, samples

LANGUAGES = ("en", "es", "en", "fr", "es", "en", "fr", "en")


def labelled(count=8, **facts):
    found = samples(count, **facts)
    return [
        type(sample)(**(vars(sample) | {"language": language}))
        for sample, language in zip(found, LANGUAGES, strict=False)
    ]


def totals_of(model, found, permutations=2, bootstraps=2, size=3, **values):
    settings = selectivity_settings({"run": "none", **values})
    replicates = draw({s.sample_id: s.language for s in found}, permutations, bootstraps, 0)
    sums = LabelSums(model, settings, replicates)
    for texts, batch in batches(model, captions_of(model, found, "language", None), size):
        sums.add(texts, batch)
    return add_up([sums.table()], replicates.labels), replicates


@pytest.mark.parametrize("modality", ["text", "image", "both"])
def test_activity_is_the_census_s(open_model, modality):
    model, found = open_model("llava"), labelled()
    totals, replicates = totals_of(model, found, modality=modality)
    rows = merged(model, [analyse(model, found)])["activity"]
    rows = rows.filter(np.array([kind == "language" for kind in rows["label_kind"].to_pylist()]))
    counted = of_activity(rows, replicates.labels, modality, sum(model.widths))
    assert torch.equal(totals["active"].tokens[0], counted["active"].tokens[0])
    # A number near zero may fall on either side of it where another sample shares the batch.
    torch.testing.assert_close(totals["active"].sums[0], counted["active"].sums[0], atol=2, rtol=0)
    torch.testing.assert_close(totals["squares"].sums[0], counted["squares"].sums[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", ["vision", "projector"])
def test_a_tower_s_activity_is_the_census_s(open_model, module):
    model, found = open_model("llava"), labelled()[1::2]
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
    for (said,), batch in batches(model, captions_of(model, found, "language", None), 1):
        scored = score_batch(model, batch, token_places(batch, [said]), folded=True)
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


def test_images_of_different_sizes_are_refused_for_towers(open_model):
    with pytest.raises(InputError, match="give --batch-size 1"):
        totals_of(open_model("llava_next"), labelled(), module="vision", size=4)


def test_text_alone_is_counted_too(open_model):
    model, found = open_model("llava"), labelled(image=None)
    totals, _ = totals_of(model, found)
    assert totals["active"].tokens[0].sum() > 0
