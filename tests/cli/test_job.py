"""Jobs: a command with the settings of a file, and overrides of single ones."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmray.cli.job import words_of
from mmray.errors import InputError
from mmray.features.pipeline.job import pipeline_settings
from mmray.runs.run import open_run
from mmray.terminal.config import read_config
from tests.support.command import Answer
from tests.support.scenes import scenes, write

JOBS = Path(__file__).parents[2] / "jobs"
NAMES = st.text("abcxyz_", min_size=1, max_size=4)
VALUES = st.none() | st.booleans() | st.integers(-5, 5) | st.text("abc ", max_size=4) | st.lists(st.integers(0, 3))


@pytest.fixture
def job(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Return what runs a job as `python jobs/NAME.py ARGUMENTS` does."""

    def call(name: str, *arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
        captured = capfd.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def config(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    settings = {"model": str(tiny("llava")), "data": str(write(tmp_path / "data.parquet", scenes(6))), "shard_size": 2}
    path = tmp_path / "census.yaml"
    path.write_text(yaml.safe_dump(settings | {"out": str(tmp_path / "run"), "workers": "1:2", "local": True}))
    return path


def test_a_census_from_a_file(job: Callable[..., Answer], config: Path, tmp_path: Path) -> None:
    answer = job("census", "--config", config, "limit=4", "top_k=3")
    assert answer.status == 0, answer.err
    run = open_run(tmp_path / "run")
    assert (run.info["settings"]["limit"], run.info["settings"]["top_k"], run.info["settings"]["workers"]) == (
        4,
        3,
        "1:2",
    )
    assert run.status().shards_done == 2
    # The same again is the same run, and others settings are refused as on the command line.
    assert job("census", "--config", config, "limit=4", "top_k=3").status == 0
    assert "holds a run with other settings" in job("census", "--config", config, "limit=4").refusal


def test_a_refresh_from_a_file(job: Callable[..., Answer], config: Path, tmp_path: Path) -> None:
    assert job("census", "--config", config).status == 0
    (tmp_path / "refresh.yaml").write_text(f"run: {tmp_path / 'run'}\nlimit: 0.2\njson: true\nlocal: true\n")
    answer = job("refresh", "--config", tmp_path / "refresh.yaml", "batch_size=4")
    assert (answer.status, answer.err) == (0, "")
    assert '"new_samples": 0' in answer.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "none.yaml"], "none.yaml: No such file or directory; give a YAML file"),
        (["--config", "{}", "limits=4"], "unknown setting 'limits'; see mmray census --help"),
        (["--config", "{}", "limit"], "override 'limit': write NAME=VALUE, such as limit=100"),
        (["--config", "{}", "limit=[1"], "override 'limit=[1': not YAML"),
        (["--config", "{}", "model.name=x"], "override 'model.name=x': model is a single value"),
        (["--config", "{}", "limit=0"], "setting limit = 0: Input should be greater than or equal to 1"),
        (["--config", "{}", "limit=many"], "Invalid value for '--limit'"),
        (
            ["--config", "{}", "workers=3:2"],
            "setting workers = '3:2': give a number of at least 1, or MIN:MAX",
        ),
    ],
)
def test_bad_input_is_one_line(job: Callable[..., Answer], config: Path, arguments: list[str], said: str) -> None:
    assert said in job("census", *(word.replace("{}", str(config)) for word in arguments)).refusal


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "3: 4", "a: [", ""])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=r"x\.yaml: ") as refusal:
        read_config(tmp_path / "x.yaml")
    assert "\n" not in str(refusal.value)


def test_a_file_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(InputError, match="not YAML"):
        read_config(tmp_path / "x.yaml")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:8", "1:8"),
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
        ("010", "010"),
        ("10", 10),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("2.5", 2.5),
        (".5", 0.5),
        ("True", True),
        ("null", None),
        ("", None),
        ("s3://bucket/run", "s3://bucket/run"),
        ("'7'", "7"),
        ("[a, 2]", ["a", 2]),
    ],
)
def test_values_are_what_they_look_like(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "x.yaml").write_text("a: 1")
    assert read_config(tmp_path / "x.yaml", [f"b={text}"]) == {"a": 1, "b": value}


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.lists(NAMES, min_size=1, max_size=3), VALUES)
def test_an_override_changes_one_value(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any], names: list[str], value: Any
) -> None:
    path = tmp_path_factory.mktemp("config") / "x.yaml"
    path.write_text(yaml.safe_dump({"other": 1} | settings))
    if len(names) > 1:
        settings.pop(names[0], None)
        path.write_text(yaml.safe_dump({"other": 1} | settings))
    word = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    changed = read_config(path, [f"{'.'.join(names)}={word}"])
    place = changed
    for name in names[:-1]:
        place = place[name]
    assert place[names[-1]] == value
    rest = {name: kept for name, kept in changed.items() if name != names[0]}
    assert rest == {name: kept for name, kept in ({"other": 1} | settings).items() if name != names[0]}


def test_words_of_every_kind() -> None:
    words = words_of(
        "census", {"model": "demo", "fold_norm": True, "retry_failed": False, "limit": None, "prompt": "-x"}
    )
    assert words == ["census", "--model=demo", "--prompt=-x", "--fold-norm", "--"]
    assert words_of("diff", {"run_b": None, "before": "b", "after": "a", "json": True}) == [
        "diff",
        "--json",
        "--",
        "b",
        "a",
    ]


CONFIGS = sorted((JOBS / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "pipeline"], ids=lambda path: path.name)
def test_configurations_that_are_shipped_fit_their_command(path: Path) -> None:
    command = "census" if path.stem == "demo" else path.stem
    assert words_of(command, read_config(path))[0] == command


def test_concepts_that_are_shipped_are_plain_nouns() -> None:
    """The detector's template and the article of questions are put round them."""
    for path in CONFIGS:
        shipped = read_config(path)
        for name in (shipped.get("source"), shipped.get("target"), *(shipped.get("unrelated") or ())):
            assert name is None or name.split()[0] not in ("a", "an", "the"), (path.name, name)


def test_the_pipeline_that_is_shipped_has_the_settings_of_its_steps() -> None:
    settings = pipeline_settings(read_config(JOBS / "configs" / "pipeline.yaml", ["census.out=s3://b/run"]))
    assert settings.census["out"] == "s3://b/run"
    assert settings.edits


def test_a_pipelines_file_is_changed_by_dotted_names(job: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("census: {model: demo, data: demo, out: run}\nedits: {a: {suppress: dog}}")
    for change, said in (
        ("census.limit=0", "setting limit = 0"),
        ("edits.a.method=magic", "edits, a: setting method = 'magic'"),
        ("evaluation.limit=0", "evaluation: setting limit = 0"),
    ):
        assert said in job("pipeline", "--config", tmp_path / "x.yaml", change).refusal
