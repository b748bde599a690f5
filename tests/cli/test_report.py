"""`mmray report` as users call it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.runs.run import Run
from mmray.storage import open_store
from tests.support.command import Answer

Mmray = Callable[..., Answer]


def test_a_report_is_one_file_and_its_place_is_said(mmray: Mmray, run: Run, tmp_path: Path) -> None:
    answer = mmray("report", run.uri, "--out", tmp_path / "found.html")
    assert (answer.status, answer.err) == (0, "")
    assert Path(answer.out.splitlines()[0]) == tmp_path / "found.html"
    assert [path.name for path in tmp_path.iterdir()] == ["found.html"]
    assert (tmp_path / "found.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_pages_are_a_folder(mmray: Mmray, run: Run, tmp_path: Path) -> None:
    answer = mmray("report", run.uri, "--pages", tmp_path / "pages")
    assert Path(answer.out.splitlines()[0]) == tmp_path / "pages" / "index.html"
    assert (tmp_path / "pages" / "plotly.min.js").is_file()


def test_reports_go_to_s3(mmray: Mmray, run: Run, bucket: str) -> None:
    answer = mmray("report", run.uri, "--out", f"s3://{bucket}/reports/found.html")
    assert answer.status == 0
    assert open_store(f"s3://{bucket}/reports").read("found.html").startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "no run here"), (["RUN", "--edit", "nowhere"], "no edit here (no edit.json)")],
)
def test_what_is_not_there_is_one_line(
    mmray: Mmray, run: Run, tmp_path: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [run.uri if word == "RUN" else word for word in arguments]
    assert said in mmray("report", *words, "--out", tmp_path / "found.html").refusal
    assert not (tmp_path / "found.html").exists()
