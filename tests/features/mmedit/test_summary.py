"""The paper's table from outcomes of records, its page of the report, and settings that are refused."""

import shutil
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any

import pyarrow as pa
import pytest

from mmray.errors import InputError
from mmray.features.mmedit.editors import LEFT_OUT
from mmray.features.mmedit.settings import mmedit_settings
from mmray.features.mmedit.summary import FIVE, HARMONIC, PROTOCOLS, summarise
from mmray.features.mmedit.tables import PARTS, TABLES
from mmray.report.content import gather
from mmray.runs.run import Run, open_run
from tests.support.local_jobs import write_table

SUFFIXES = {
    "published": ("_exact", "_exact", "_exact", "_legacy_top1", "_legacy"),
    "token": ("_token", "_token", "_token", "_legacy_top1", "_legacy"),
    "corrected": ("", "", "", "", ""),
}


def outcome(record: int, measure: str, value: float, **more: Any) -> dict[str, Any]:
    what = {
        "task": "E-VQA",
        "method": "learned",
        "edits": 1,
        "sample_id": f"mmedit: {record}",
        "image": f"{record}.png",
    }
    return what | {"measure": f"mmedit_{measure}", "before": [0.0, 1.0], "after": [value, 1.0]} | more


def test_each_protocol_takes_its_own_measures_and_their_harmonic_mean() -> None:
    values = {
        (name, end, record): (7 * number + 3 * record + len(end)) % 10 / 10 + 0.05
        for protocol, ends in SUFFIXES.items()
        for number, (name, end) in enumerate(zip(FIVE, ends, strict=True))
        for record in range(4)
    }
    rows = [outcome(record, f"{name}{end}", value) for (name, end, record), value in values.items()]
    table = summarise(pa.Table.from_pylist(rows, schema=PARTS["outcomes"]), 50, 0).to_pylist()
    found = {(row["protocol"], row["measure"]): row for row in table}
    assert set(SUFFIXES) == set(PROTOCOLS)
    for protocol, ends in SUFFIXES.items():
        five = [mean(values[name, end, record] for record in range(4)) for name, end in zip(FIVE, ends, strict=True)]
        for name, value in zip(FIVE, five, strict=True):
            assert found[protocol, name]["value"] == pytest.approx(value)
        whole = found[protocol, HARMONIC]
        assert whole["value"] == pytest.approx(harmonic_mean(five))
        assert whole["low"] <= whole["value"] <= whole["high"]
        assert whole["n"] == 4


def test_the_mean_is_of_records_with_all_five() -> None:
    full = [outcome(0, name, 0.5) for name in FIVE]
    table = summarise(pa.Table.from_pylist([*full, outcome(1, FIVE[0], 1.0)], schema=PARTS["outcomes"]), 5, 0)
    found = {(row["protocol"], row["measure"]): row for row in table.to_pylist()}
    assert found["corrected", FIVE[0]]["value"] == 0.75
    assert (found["corrected", HARMONIC]["value"], found["corrected", HARMONIC]["n"]) == (0.5, 1)
    assert ("published", HARMONIC) not in found


def test_the_page_has_the_table(run: Run, tmp_path: Path) -> None:
    assert gather(run).index["mmedit"]["tables"] == []
    shutil.copytree(run.uri, tmp_path / "run")
    rows = [outcome(record, name, record / 2) for name in FIVE for record in range(3)]
    table = summarise(pa.Table.from_pylist(rows, schema=PARTS["outcomes"]), 5, 0)
    assert table.schema.names == TABLES["mmedit"].names
    write_table(tmp_path / "run", "mmedit", table)
    page = gather(open_run(tmp_path / "run")).index["mmedit"]
    (shown,) = page["tables"]
    assert (shown["task"], shown["protocol"], page["left_out"]) == ("E-VQA", "corrected", LEFT_OUT)
    assert {name: shown["rows"][0][name]["value"] for name in FIVE} == dict.fromkeys(FIVE, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give --vqa or --captioning"),
        ({"vqa": "vqa.json", "methods": "learned,mend"}, "unknown method 'mend'; choose from learned"),
        ({"vqa": "vqa.json", "methods": "zero"}, "unknown method 'zero'"),
        ({"vqa": "vqa.json", "sequential": 0}, "sequential"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mmedit_settings({"run": "run", **settings})
