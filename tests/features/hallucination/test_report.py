"""The report's second opinion is the tables of `mmray hallucination`."""

import base64
import shutil

import pyarrow as pa

from mmray.features.hallucination.report import section
from mmray.features.hallucination.tables import TABLES
from mmray.report.content import gather
from mmray.report.section import Request
from mmray.runs.run import open_run
from tests.support.local_jobs import write_table


def test_a_run_that_was_not_judged_has_no_such_page(run):
    assert gather(run).index["hallucination"] == {"measures": [], "mistakes": []}


def test_measures_and_mistakes_are_those_of_the_tables(run, tmp_path):
    shutil.copytree(run.uri, tmp_path / "run")
    measure = {"claims": "caption", "measure": "auroc", "judge": "detector", "value": 0.91, "n": 7, "protocol": "words"}
    mistake = {"kind": "caption", "word": "<b>", "text": "An image of <b>.", "confidence": 0.25, "picture": b"\x89PNG"}
    for name, row in (("opinions", measure), ("mistakes", mistake)):
        write_table(tmp_path / "run", name, pa.Table.from_pylist([row], schema=TABLES[name]))
    found = section(Request(open_run(tmp_path / "run"))).page
    assert measure.items() <= found["measures"][0].items()
    assert found["mistakes"][0]["word"] == "<b>"
    assert base64.b64decode(found["mistakes"][0]["picture"].partition(",")[2]) == b"\x89PNG"
