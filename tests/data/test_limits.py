"""Before any work: ids that occur twice and labels of many values are refused in one line, whatever form data has."""

import json
import re
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmray.data.columns import Columns, detect
from mmray.data.limits import MOST_LABELS, check_columns
from mmray.data.rows import LONGEST_ID, samples
from mmray.data.samples import Failure, Sample
from mmray.data.shards import DUPLICATE, cut, read_shard
from mmray.data.sources import open_source
from mmray.errors import InputError
from tests.support.data_files import FORMS, Row, members, write_coco, write_parquet, write_tar

WITH_IDS = [form for form in FORMS if form != "coco"]


def check(data: Path, shard_size: int = 4, limit: int | None = None, **columns: object) -> None:
    source = open_source(str(data), Columns(**columns))  # type: ignore[arg-type]
    check_columns(source, cut(source.files(), shard_size, limit))


@pytest.mark.parametrize("form", WITH_IDS)
def test_an_id_that_occurs_twice_is_refused(form: str, tmp_path: Path, rows: list[Row]) -> None:
    rows[7]["sample_id"] = rows[2]["sample_id"]
    data = FORMS[form](tmp_path / "data", rows)
    with pytest.raises(InputError, match="1 row has the id of an earlier row in column 'sample_id'") as refusal:
        check(data)
    assert repr(rows[2]["sample_id"]) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    # Not where the second is left out, and not where ids are digests.
    check(data, limit=7)
    check(data, sample_id="none")


@pytest.mark.parametrize("form", WITH_IDS)
def test_ids_that_differ_are_fine(form: str, tmp_path: Path, rows: list[Row]) -> None:
    check(FORMS[form](tmp_path / "data", rows))


def test_coco_s_ids_are_those_of_image_and_caption(tmp_path: Path, rows: list[Row]) -> None:
    file = write_coco(tmp_path, rows)
    check(file)
    content = json.loads(file.read_text())
    content["annotations"].append(content["annotations"][0] | {"caption": "Another."})
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="1 row has the id of an earlier row"):
        check(file)


@pytest.mark.parametrize("form", WITH_IDS)
@pytest.mark.parametrize("kind", ["language", "domain", "place"])
def test_labels_of_many_values_are_refused(
    form: str, kind: str, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, row in enumerate(rows):
        row[kind] = f"https://{number}"
    data = FORMS[form](tmp_path / "data", rows)
    named = {"labels": ("place",)} if kind == "place" else {}
    monkeypatch.setattr("mmray.data.limits.MOST_LABELS", len(rows) - 1)
    option = "no --label-column place" if kind == "place" else f"--{kind}-column none"
    with pytest.raises(InputError, match=f"{kind} has 9 values, more than 8; .*{option}"):
        check(data, **named)
    check(data, limit=8, **named)
    check(data, **({"labels": ()} if named else {kind: "none"}))
    monkeypatch.setattr("mmray.data.limits.MOST_LABELS", len(rows))
    check(data, **named)


def test_some_hundreds_of_labels_are_too_many(tmp_path: Path, rows: list[Row]) -> None:
    assert 100 < MOST_LABELS < 500
    many = [rows[0] | {"sample_id": f"s{number}", "domain": f"d{number}"} for number in range(MOST_LABELS + 1)]
    with pytest.raises(InputError, match=f"domain has {MOST_LABELS + 1} values"):
        check(write_parquet(tmp_path, many))
    check(write_parquet(tmp_path, many[1:]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 12))
def test_whether_data_is_refused_depends_neither_on_order_nor_on_shards(
    tmp_path: Path, ids: list[str], shard_size: int, other_size: int
) -> None:
    twice = len(set(ids)) < len(ids)
    for size, names in ((shard_size, ids), (other_size, Random(0).sample(ids, len(ids)))):
        texts: list[Row] = [{"sample_id": name, "text": "A dog."} for name in names]
        data = write_parquet(tmp_path, texts, f"{uuid4().hex}.parquet")
        try:
            check(data, size)
        except InputError as refusal:
            assert twice
            repeated = len(ids) - len(set(ids))
            assert re.search(f"{repeated} rows? ha", str(refusal))
        else:
            assert not twice


def test_no_two_samples_of_a_shard_have_the_same_given_id(tmp_path: Path, rows: list[Row]) -> None:
    rows[3] |= {"sample_id": rows[1]["sample_id"], "caption": "Another caption."}
    source = open_source(str(write_parquet(tmp_path, rows)))
    read = list(read_shard(source, cut(source.files(), 100).shards[0]))
    assert len(read) == len(rows)
    refused = read[3]
    assert isinstance(refused, Failure)
    assert (refused.sample_id, refused.stage) == (rows[1]["sample_id"], DUPLICATE)
    assert "occurs twice; the first is used, at data.parquet#1" in refused.message
    first = read[1]
    assert isinstance(first, Sample)
    assert (first.image, first.caption) == (rows[1]["image"]["bytes"], rows[1]["caption"])


def test_rows_that_are_the_same_have_the_same_digest_and_stay(tmp_path: Path, rows: list[Row]) -> None:
    data = write_tar(tmp_path / "data.tar", [*members(rows), *members(rows[:1], len(rows))])
    source = open_source(str(data), Columns(sample_id="none"))
    read = list(read_shard(source, cut(source.files(), 100).shards[0]))
    assert all(isinstance(row, Sample) for row in read)
    assert read[0].sample_id == read[-1].sample_id
    with pytest.raises(InputError, match="1 row has the id"):
        check(data)


@pytest.mark.parametrize("name", ["a" * LONGEST_ID, "é" * (LONGEST_ID // 2)])
def test_a_long_id_is_a_row_in_errors(name: str) -> None:
    columns = Columns(image="image", caption="caption", sample_id="id")
    records = [("0", {"image": b"x", "caption": "A dog.", "id": name + more}) for more in ("", "é", "a" * 10**6)]
    good, *bad = samples(records, columns, True, lambda _: [])
    assert isinstance(good, Sample)
    assert good.sample_id == name
    for row, size in zip(bad, (1_026, 10**6 + 1_024), strict=True):
        assert row == Failure("", "0", "read", f"sample id of {size:,} bytes in column 'id'; at most 1,024")


def test_a_column_called_id_is_found() -> None:
    found = detect({"image": "image", "caption": "text", "ID": "number"}, Columns(), "here")
    assert found.sample_id == "ID"
    both = detect({"id": "number", "image": "image", "caption": "text", "uid": "text"}, Columns(), "here")
    assert both.sample_id == "uid"
