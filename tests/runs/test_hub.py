"""A run's tables on the Hugging Face hub, of which a stand-in runs here."""

import datasets
import pytest
from typer.testing import CliRunner

from mmray.cli import app
from mmray.errors import InputError
from mmray.report.writing import shareable_report
from mmray.runs.hub import push_run
from mmray.runs.run import open_run
from mmray.storage import open_store
from tests.support.hub import hub_here


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    # Read when the library is imported, which another test may have caused.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_here() as hub:
        yield hub


def downloaded(hub, folder):
    for path, content in hub.files["org/neurons"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_what_is_on_the_hub_is_read_by_tables(run, hub, tmp_path):
    assert push_run(run, "org/neurons", endpoint=hub.endpoint) == f"{hub.endpoint}/datasets/org/neurons"
    folder = downloaded(hub, tmp_path / "hub")
    for name in ("rankings", "captions", "neurons"):
        found = datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "cache"), split="train")
        assert len(found) == len(run.table(name))
    assert not hub.private["org/neurons"]


def test_nothing_of_this_machine_is_uploaded(run, hub):
    store = open_store(run.uri)
    assert len(run.table("errors"))
    push_run(run, "org/neurons", private=True, endpoint=hub.endpoint)
    files = hub.files["org/neurons"]
    assert hub.private["org/neurons"]
    assert set(files) == {"README.md"} | {
        entry.key for entry in store.list("tables/") if entry.key != "tables/errors.parquet"
    }
    assert b"errors" not in files["README.md"]
    assert not any(run.uri.encode() in content for content in files.values())


def test_a_second_push_updates_the_first(run, hub):
    for _ in range(2):
        push_run(run, "org/neurons", endpoint=hub.endpoint)
    assert hub.commits == 2


def test_a_run_on_s3_is_uploaded_as_well(run, hub, bucket):
    store, source = open_store(f"s3://{bucket}/hub"), open_store(run.uri)
    for entry in source.list(""):
        store.put(entry.key, source.read(entry.key))
    push_run(open_run(f"s3://{bucket}/hub"), "org/neurons", endpoint=hub.endpoint)
    assert hub.files["org/neurons"]["tables/rankings.parquet"] == source.read("tables/rankings.parquet")


def test_a_report_is_uploaded_if_asked(run, hub):
    """One that names no folder of this machine, although the run's settings and failures do."""
    push_run(run, "org/neurons", report=b"<p>", endpoint=hub.endpoint)
    assert hub.files["org/neurons"]["report.html"] == b"<p>"
    page = shareable_report(run).decode()
    assert run.info["settings"]["data"] not in page
    failures = run.table("errors")["source"].to_pylist()
    assert failures
    assert not [place for place in (run.uri, *failures) if place in page]
    assert run.rank(next(iter(run.concepts)), 1)["neuron"][0].as_py() in page


@pytest.mark.parametrize(
    ("name", "problem"),
    [("a b/c", "no name of a data set"), ("org/neurons", "the hub refuses"), ("nobody", "can't be reached")],
)
def test_what_goes_wrong_is_one_line(run, hub, name, problem):
    hub.refuses = True
    endpoint = "http://127.0.0.1:9" if name == "nobody" else hub.endpoint
    with pytest.raises(InputError, match=problem) as refused:
        push_run(run, name, endpoint=endpoint)
    assert "\n" not in str(refused.value)


def test_the_command_says_how_to_read_it(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.endpoint)
    told = CliRunner().invoke(app, ["push", run.uri, "org/neurons"])
    assert told.exit_code == 0, told.output
    assert f"{hub.endpoint}/datasets/org/neurons" in told.output
    assert 'datasets.load_dataset("org/neurons", "rankings")' in told.output
