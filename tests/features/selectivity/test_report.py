"""The report's languages and domains are the tables of `mmray selectivity`, analysis by analysis."""

import json
import shutil
from pathlib import Path

import pytest

from mmray.features.selectivity.report import CAPTIONS, section
from mmray.report.content import gather
from mmray.report.section import Request
from mmray.report.writing import write_report
from mmray.runs.run import Run, open_run
from tests.support.labelled import DOMAIN, EFFECTS, LABELS, LANGUAGE, TOGETHER, add_labels


@pytest.fixture(scope="module")
def labelled(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("labelled") / "run"
    shutil.copytree(run.uri, folder)
    add_labels(folder)
    return open_run(folder)


def test_a_run_without_such_tables_has_no_such_page(run, labelled):
    assert gather(run).index["selectivity"] == []
    assert len(gather(labelled).index["selectivity"]) == 3


def test_analyses_are_told_apart(labelled):
    together, by_language, by_domain = section(Request(labelled)).page
    assert TOGETHER.items() <= together.items()
    assert LANGUAGE.items() <= by_language.items()
    assert DOMAIN.items() <= by_domain.items()
    assert by_language["matrices"]
    assert (by_domain["steering"], by_domain["stages"]) == ([], [])


def test_modules_together_have_the_paper_s_tables(labelled):
    first, *_ = section(Request(labelled)).page
    shown = first["together"]
    assert (shown["labels"], shown["modules"]) == (list(LABELS), [DOMAIN["module"]])
    assert {(row["module"], row["label"]) for row in shown["counts"]} == {("vision", label) for label in LABELS}
    # Each label's own samples only, of the module and of all.
    assert len(shown["effects"]) == 2 * len(LABELS) * len(EFFECTS)
    assert {(row["module"], row["change"], row["n"]) for row in shown["effects"]} == {
        ("vision", -0.25, 12),
        ("all", -0.25, 12),
    }
    assert [(row["before"], row["after"]) for row in shown["replies"]] == [("Yes", "<i>No</i>")]
    assert first["matrices"][0]["protocols"] == {f"scored for {n}": [label] for n, label in enumerate(LABELS)}


def test_labels_have_their_layers_and_first_neurons(labelled):
    for analysis in section(Request(labelled)).page[1:]:
        assert [row["label"] for row in analysis["labels"]] == list(LABELS)
        for row in analysis["labels"]:
            assert sum(row["layers"]) == row["neurons"]
            assert row["first"][:3] == ["L1.u1", "L2.u2", "L0.u3"]


def test_matrices_are_the_table_with_the_own_label_on_the_diagonal(labelled):
    matrices = section(Request(labelled)).page[1]["matrices"]
    assert [(row["measure"], row["control"]) for row in matrices] == [
        (measure, control) for measure in ("nll", "accuracy") for control in EFFECTS
    ]
    kept = {
        (row["measure"], row["control"], row["masked"], row["label"]): row
        for row in labelled.table("interventions").to_pylist()
        if row["label_kind"] == LANGUAGE["label_kind"]
    }
    for shown in matrices:
        assert [row["masked"] for row in shown["masks"]] == shown["labels"] == list(LABELS)
        for mask in shown["masks"]:
            for label, cell in zip(shown["labels"], mask["cells"], strict=True):
                row = kept.pop((shown["measure"], shown["control"], mask["masked"], label))
                for name in ("before", "after", "change", "low", "high", "n"):
                    assert cell[name] == pytest.approx(row[name], rel=1e-3)
    assert kept == {}


def test_shares_of_steering_are_over_all_captions_and_failures_are_among_the_examples(labelled):
    (pair,) = section(Request(labelled)).page[1]["steering"]
    rows = labelled.table("steering").to_pylist()
    assert pair["n"] == len(rows)
    assert pair["turned"] == sum(row["label_after"] == LABELS[1] for row in rows)
    assert pair["whole"] == sum(row["words_after"] == 1 for row in rows)
    assert pair["already"] == 0
    assert len(pair["examples"]) == CAPTIONS
    failed = [row["sample_id"] for row in pair["examples"] if row["label_after"] != LABELS[1]]
    assert failed == [row["sample_id"] for row in rows if row["label_after"] is None]


def test_the_page_is_json_without_nan_and_without_markup(labelled, tmp_path):
    page = Path(write_report(labelled, tmp_path / "report.html")).read_text(encoding="utf-8")
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (_, shown, _) = json.loads(data, parse_constant=refuse)["index"]["selectivity"]
    assert shown["labels"][0]["chance"] is None
    assert shown["stages"][0]["tokens"][0] == "</script>"
    assert LABELS[1] not in page
