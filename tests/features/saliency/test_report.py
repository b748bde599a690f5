"""The report's saliency is the tables of `mmray saliency`."""

import base64
import shutil

import pyarrow as pa

from mmray.features.saliency.report import WORDS, section
from mmray.features.saliency.tables import TABLES
from mmray.report.content import gather
from mmray.report.section import Request
from mmray.runs.run import open_run
from tests.support.local_jobs import write_table


def test_a_run_that_was_not_measured_has_no_such_page(run):
    assert gather(run).index["saliency"] == {"measures": [], "words": []}


def test_measures_and_maps_are_those_of_the_tables(run, tmp_path):
    shutil.copytree(run.uri, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    samples = opened.table("captions")["sample_id"].to_pylist()
    measure = {"measure": "iou", "method": "gradient", "value": 0.25, "low": 0.2, "high": 0.3, "words": 9, "n": 7}
    maps = [
        {"concept": f"word {number}", "sample_id": samples[number % len(samples)], "method": method}
        | {"rows": 2, "columns": 2, "values": [0.0, 1.0, 2.0, 4.0], "covers": [0, 0, 1, 1], "hit": True}
        | {"boxes": [[0.1, 0.2, 0.3, 0.4]]}
        for number in range(WORDS + 5)
        for method in ("alignment", "gradient")
    ]
    for name, rows in (("saliency", [measure]), ("saliency_maps", maps)):
        write_table(opened.uri, name, pa.Table.from_pylist(rows, schema=TABLES[name]))
    content = gather(open_run(tmp_path / "run"))
    assert measure.items() <= content.index["saliency"]["measures"][0].items()
    words = section(Request(open_run(tmp_path / "run"))).page["words"]
    assert len(words) == WORDS and all(set(row["maps"]) == {"alignment", "gradient"} for row in words)
    map_ = words[0]["maps"]["alignment"]
    assert base64.b64decode(map_["values"]) == bytes([0, 64, 128, 255]) and map_["box"] == [0.1, 0.2, 0.3, 0.4]
    assert {row["id"] for row in words} <= set(content.samples())
