"""Which samples an analysis of labels looks at, holds out, and refuses; from a table of captions alone."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from mmray.errors import InputError
from mmray.features.census.tables import TABLES
from mmray.features.selectivity.plan import LabelPlan, plan_labels
from mmray.features.selectivity.settings import selectivity_settings

IMAGES = 40


class Known:
    """Stands for a run whose captions are known."""

    uri = "runs/known"

    def __init__(self, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
        captions = pa.Table.from_pylist([{"shard_id": 0, **row} for row in rows], schema=TABLES["captions"])
        self.tables = {"captions": captions.select(columns or captions.column_names)}
        self.info = {"settings": {"model": "demo", "data": "none", "out": "nowhere"}}

    def table(self, name: str) -> pa.Table:
        return self.tables[name]


def planned(rows: list[dict[str, Any]], columns: list[str] | None = None, **settings: Any) -> LabelPlan:
    checked = selectivity_settings({"run": "known", **settings})
    return plan_labels(checked, Known(rows, columns), checked.tests)  # type: ignore[arg-type]


def rows(languages: str = "en es fr") -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{image}-{language}",
            "caption": f"{language} {image}",
            "language": language,
            "image": f"i{image}",
        }
        for image in range(IMAGES)
        for language in languages.split()
    ]


def test_all_captions_of_an_image_are_held_out_or_none():
    plan = planned(rows(), interventions=True, held_out=0.4)
    images = Counter(name.split("-")[0] for name in plan.held_out)
    assert set(images.values()) == {3}
    assert 0 < len(images) < IMAGES
    assert not plan.held_out & set(plan.replicates.samples)


def test_captions_of_an_image_are_drawn_again_together():
    replicates = planned(rows(), permutations=0, bootstraps=5).replicates
    times = replicates.times.reshape(6, IMAGES, 3)  # samples stand in order of their names
    assert (times == times[:, :, :1]).all()
    assert (times[1:] != 1).any()


def test_a_run_without_images_digests_goes_by_samples():
    columns = [name for name in TABLES["captions"].names if name != "image"]
    plan = planned(rows(), columns, interventions=True, held_out=0.4)
    assert all(name == image for name, image in plan.images.items())
    assert plan.held_out


def test_one_name_for_unlike_captions_is_refused():
    named = [row | {"sample_id": row["image"]} for row in rows()]
    with pytest.raises(InputError, match=r"runs/known: sample_id 'i0' occurs 3 times .* --id-column") as refused:
        planned(named)
    assert "\n" not in str(refused.value)


def test_a_line_that_a_corpus_repeats_is_no_error():
    again = [*rows(), *rows()]
    assert planned(again).labelled == planned(rows()).labelled


def test_a_label_that_nothing_is_held_out_of_is_named():
    few = [*rows("en es"), *rows("fr")[:1]]
    refused = r"no sample of fr is (held out to test on; .* --held-out|left to select from)"
    with pytest.raises(InputError, match=refused):
        planned(few, interventions=True)
    with pytest.raises(InputError, match="no sample of en, es, fr is held out to test on"):
        planned(rows(), stages=True, held_out=1e-6)
