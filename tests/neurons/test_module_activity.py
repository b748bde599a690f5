"""The activity of vision towers and projectors is that of plain loops over the samples, whatever the batch."""

import weakref

import numpy as np
import pytest

from mmray.errors import InputError
from mmray.features.census.merging import RunMerge
from mmray.features.census.neuron_sums import activity_table
from mmray.models.capture import capture_activations
from mmray.models.tiny.variants import PATCH, SIDE, VARIANTS
from mmray.neurons.activation_cache import forward
from mmray.neurons.module_activity import ModuleActivity
from tests.support.samples import CAPTIONS, analyse, batch_of, picture, png, sample, samples

SQUARE_PATCHES = (SIDE // PATCH) ** 2
PROJECTORS = [name for name in VARIANTS if name not in ("paligemma", "gemma3", "idefics3", "smolvlm", "mllama")]


def own(model, batch, rows):
    """Return the rows that are the image's: of Mllama those of its tiles, without what fills them up to eights."""
    if model.parts.family != "mllama":
        return rows
    real = batch.inputs["aspect_ratio_mask"].flatten().bool()
    return rows.reshape(len(real), -1, rows.shape[-1])[real, : SQUARE_PATCHES + 1].flatten(0, 1)


def check(model, module):
    # The pictures of batch_of are all landscape, those of samples() in turns: odd numbers are the same.
    found = [sample(number, CAPTIONS[number]) for number in (1, 3, 5)]
    rows = analyse(model, found, module=module)["activity"].to_pylist()
    plain = analyse(model, found)["activity"].to_pylist()
    assert [row for row in rows if row["module"] == "language"] == plain
    (row,) = [row for row in rows if row["module"] == module and row["label_kind"] == "all"]
    assert row["modality"] == "image"
    tokens, totals = 0, 0
    for number in (1, 3, 5):
        batch, _ = batch_of(model, [CAPTIONS[number]], first=number)
        projections = [projection for projection in model.parts.of(module) if not projection.reads_text]
        seen = {}
        with capture_activations(model.network, projections, lambda *call, seen=seen: seen.update({call[0]: call[1:]})):
            forward(model, batch)
        seen = {layer: [own(model, batch, rows) for rows in pair] for layer, pair in seen.items()}
        tokens += len(seen[0][0])
        parts = [
            np.stack([(opened > 0).sum(0), values.double().sum(0), values.double().square().sum(0)])
            for _, (values, opened) in sorted(seen.items())
        ]
        totals = totals + np.concatenate(parts, axis=1)
    assert row["n_tokens"] == tokens
    # A number near zero may fall on either side of it.
    np.testing.assert_allclose(row["n_active"], totals[0], atol=2)
    np.testing.assert_allclose(row["sum"], totals[1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(row["sum_squares"], totals[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vision_tower_s_activity(open_model, variant):
    check(open_model(variant), "vision")


@pytest.mark.parametrize("variant", PROJECTORS)
def test_the_projector_s_activity(open_model, variant):
    check(open_model(variant), "projector")


@pytest.mark.parametrize("variant", ["llava", "qwen2_5_vl", "llava_next"])
def test_images_of_different_sizes_count_as_they_do_alone(open_model, variant):
    model = open_model(variant)
    together, alone = (analyse(model, samples(6), module="vision", batch_size=size) for size in (6, 1))
    assert len(together["errors"]) == 0
    first, second = (
        {(row["label_kind"], row["label"], row["modality"]): row for row in tables["activity"].to_pylist()}
        for tables in (together, alone)
    )
    assert first.keys() == second.keys()
    for key, row in first.items():
        assert row["n_tokens"] == second[key]["n_tokens"]
        np.testing.assert_allclose(row["sum"], second[key]["sum"], rtol=1e-3, atol=1e-3)


def test_tiles_that_an_image_lacks_do_not_count(open_model):
    """One image of one tile and one of two, in one batch: the class token and the patches of each tile."""
    model = open_model("mllama")
    pictures = [png(picture(number, *size)) for number, size in enumerate([(40, 40), (40, 80)])]
    found = [sample(number, CAPTIONS[number], image=image, domain=str(number)) for number, image in enumerate(pictures)]
    rows = analyse(model, found, module="vision")["activity"].to_pylist()
    tokens = {
        row["label"]: row["n_tokens"] for row in rows if (row["module"], row["label_kind"]) == ("vision", "domain")
    }
    assert tokens == {"0": SQUARE_PATCHES + 1, "1": 2 * (SQUARE_PATCHES + 1)}


def test_text_alone_counts_nothing_in_the_tower(open_model):
    found = [sample(number, CAPTIONS[number], image=None) for number in range(3)]
    rows = analyse(open_model("llava"), found, module="vision")["activity"].to_pylist()
    assert {row["module"] for row in rows} == {"language"}


def test_both_modules_neurons_are_in_the_run_s_table(open_model):
    model = open_model("llava")
    tables = analyse(model, samples(4), module="vision")
    widths = [projection.width for projection in model.parts.of("vision")]
    merge = RunMerge(model.widths, None, 5, {"vision": widths})
    merge.add(tables.__getitem__)
    table = activity_table(merge.module_widths, merge.sums)
    rows = [row for row in table.to_pylist() if row["module"] == "vision" and row["label_kind"] == "all"]
    assert [(row["layer"], row["unit"]) for row in rows] == [
        (n, u) for n, width in enumerate(widths) for u in range(width)
    ]
    (part,) = [row for row in tables["activity"].to_pylist() if row["module"] == "vision"]
    assert [row["sum"] for row in rows] == part["sum"]


def test_a_module_without_an_mlp_is_refused(open_model):
    with pytest.raises(InputError, match="--module projector: there is no MLP in it"):
        analyse(open_model("gemma3"), samples(1), module="projector")


@pytest.mark.parametrize("module", ["language", "vision"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_batch_is_held_once_it_is_counted_or_has_failed(open_model, module, fails):
    model = open_model("llava")
    activity = ModuleActivity(model, module)
    batch, _ = batch_of(model, CAPTIONS[:2])
    held = weakref.ref(batch)
    try:
        with activity.watching(batch):
            forward(model, batch)
            if fails:
                raise RuntimeError("out of memory")
        activity.count([{}, {}], [None, None])
        activity.commit()
    except RuntimeError:
        assert fails
    del batch
    assert held() is None
