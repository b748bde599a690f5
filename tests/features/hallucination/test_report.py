"""The report's second opinion is the tables of `mmray hallucination`."""

import base64
import shutil

import pyarrow as pa

from mmray.features.hallucination.neuron_tables import TABLES as TABLES_OF_NEURONS
from mmray.features.hallucination.report import section
from mmray.features.hallucination.tables import TABLES
from mmray.report.content import gather
from mmray.report.section import Request
from mmray.runs.run import open_run
from tests.support.local_jobs import write_table


def test_a_run_that_was_not_judged_has_no_such_page(run):
    nothing = {"count": 0, "probe": [], "layers": [], "rows": [], "captions": [], "doses": []}
    assert gather(run).index["hallucination"] == {"measures": [], "mistakes": [], "bias": [], "neurons": nothing}


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


def test_neurons_and_doses_are_those_of_the_tables(run, tmp_path):
    shutil.copytree(run.uri, tmp_path / "run")
    neurons = [
        {"layer": 1, "unit": unit, "neuron": f"L1.u{unit}", "weight": weight, "effect": 0.5, "held_out_effect": 0.4}
        for unit, weight in ((3, 0.2), (5, -0.7))
    ]
    mentions = [
        {"fold": fold, "word": f"w{number}", "hallucinated": number % 2 == 0, "score": float(number), "text": "A <b>."}
        for number, fold in enumerate(["fit", *["test"] * 19])
    ]
    probe = [{"judge": "neurons", "measure": "auroc", "neurons": 2, "value": 0.9, "low": 0.8, "high": 0.95, "n": 20}]
    dose = [{"neurons": "raised", "change": "scale", "dose": 0.0, "count": 1, "measure": "chair_i", "value": 0.1}]
    made = {"neurons": neurons, "mentions": mentions, "probe": probe, "doses": dose}
    for name, rows in made.items():
        schema = TABLES_OF_NEURONS[f"hallucination_{name}"]
        write_table(tmp_path / "run", f"hallucination_{name}", pa.Table.from_pylist(rows, schema=schema))
    found = section(Request(open_run(tmp_path / "run"))).page["neurons"]
    assert [row["neuron"] for row in found["rows"]] == ["L1.u5", "L1.u3"]
    decoded = open_run(tmp_path / "run").sql("select tokens from neurons where layer = 1 and unit = 5").to_pylist()
    assert found["rows"][0]["tokens"] == (decoded[0]["tokens"] or [])[:6]
    assert found["layers"][1] == {"layer": 1, "raised": 1, "lowered": 1}
    assert not any(row["raised"] + row["lowered"] for row in found["layers"] if row["layer"] != 1)
    # Test mentions alone: of each class those that score highest and lowest.
    assert [row["word"] for row in found["captions"]] == [f"w{n}" for n in (18, 16, 14, 6, 4, 2, 19, 17, 15, 5, 3, 1)]
    assert found["probe"][0]["value"] == 0.9
    assert found["doses"][0]["dose"] == 0.0
