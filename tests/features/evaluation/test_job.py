"""An evaluation as the command runs it: committed once, resumed, on Ray or not, and the same as in one process."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.data.samples import Sample
from mmray.data.shards import Manifest, cut
from mmray.data.source import DataFile
from mmray.data.sources import open_source
from mmray.demo import DATA, EVALUATION
from mmray.engine import JobResult, Progress, Unit, run_together
from mmray.engine import run as run_job
from mmray.engine.units import WorkOrder
from mmray.errors import InputError
from mmray.features.evaluation import job as evaluation_job
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.evaluate import evaluate
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.measures import PRIMARY
from mmray.features.evaluation.plan import manifest_without
from mmray.features.evaluation.settings import evaluation_settings, measure_settings
from mmray.features.evaluation.summary import verdict_of
from mmray.models.decodings import GREEDY, decoding_of
from mmray.models.generation import generate
from mmray.objects.statistics import gather_statistics
from tests.support.command import Answer
from tests.support.data_files import write_coco
from tests.support.samples import samples_of
from tests.support.standin import StandIn, open_edit, swap

SOURCE = "watermelon"
LIMIT, SHARD = 8, 4
ASKED = {"text_count": 4, "pope_objects": 1, "draws": 50, "bleu": False}
SETTINGS = {"data": str(EVALUATION), "limit": LIMIT, "shard_size": SHARD, "local": True} | ASKED


def job(run: Path, edit: Path, **settings: object) -> EvaluationJob:
    values = SETTINGS | {"run": str(run), "edit": str(edit)} | settings
    return EvaluationJob(evaluation_settings(values), open_edit)


def evaluated_here(
    run: Path, edit: Path, follow: Callable[[Progress], None] = lambda _: None, **settings: object
) -> JobResult:
    return run_job(job(run, edit, **settings), follow=follow)


def measures(outcome: JobResult) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = outcome.headline["measures"]
    return found


@pytest.fixture(scope="module")
def run(own_census: Callable[..., Path]) -> Path:
    return own_census(48, shard_size=24)


@pytest.fixture(scope="module")
def own() -> list[Sample]:
    """The samples of the run that the edit was made on: those of its 48 with the source."""
    return [sample for sample in samples_of(DATA, 48) if SOURCE in (sample.objects or ())]


@pytest.fixture(scope="module")
def edit(own: list[Sample]) -> StandIn:
    return swap(SOURCE, "dog", tuple(sample.sample_id for sample in own))


@pytest.fixture(scope="module")
def done(run: Path, edit: StandIn, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobResult, list[Progress]]:
    """An undisturbed evaluation: the edit's folder, the outcome, and the progress that was told."""
    folder = edit.save(tmp_path_factory.mktemp("edits") / "swap")
    said: list[Progress] = []
    return folder, evaluated_here(run, folder, said.append), said


Done = tuple[Path, JobResult, list[Progress]]


def test_the_result_is_in_the_form_of_the_contract(done: Done, own: list[Sample]) -> None:
    folder, outcome, said = done
    content = json.loads((folder / "evaluation.json").read_text())
    assert list(content["measures"])[: len(PRIMARY)] == list(PRIMARY)
    for row in content["measures"].values():
        assert set(row) == {"before", "after", "low", "high", "n", "protocol"}
        assert row["n"] == 0 or row["before"] is None or isinstance(row["before"], float)
    assert content["measures"] == json.loads(json.dumps(measures(outcome)))
    assert content["cost"]["method"] == "stand-in"
    captions = pq.read_table(folder / "captions.parquet")
    assert captions.column_names == ["sample_id", "before", "after", "changed", "role", "image"]
    assert len(captions) == LIMIT + len(own)
    edited = [row for row in captions.to_pylist() if row["role"] == "edited"]
    assert {row["sample_id"] for row in edited} == {sample.sample_id for sample in own}
    named = sum(SOURCE in row["before"] for row in edited)
    assert content["measures"]["reliability"]["n"] == named > 0
    assert content["measures"]["reliability"]["after"] == 1
    # Two shards, the questions and the run's own samples; each is told when it is committed.
    assert (said[0].done, said[-1].done) == (0, said[-1].total)
    assert len(said) >= 5


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=4), size=st.integers(1, 5), other=st.integers(1, 5))
def test_of_the_run_s_data_what_is_not_measured_on_anyway_is_left_over(rows: list[int], size: int, other: int) -> None:
    files = [DataFile(f"f{number}", count, 1, f"d{number}") for number, count in enumerate(rows)]
    whole = cut(files, size)
    changed = [*files[:-1], replace(files[-1], digest="changed")]

    def held(manifest: Manifest) -> list[tuple[str, int]]:
        return [(p.path, n) for shard in manifest.shards for p in shard.pieces for n in range(p.start, p.stop)]

    for limit in range(sum(rows) + 2):
        measured = cut(files, other, limit)
        left = manifest_without(whole, measured)
        assert [shard.shard_id for shard in left.shards] == [shard.shard_id for shard in whole.shards]
        assert sorted(held(left) + held(measured)) == sorted(held(whole))
        kept = held(manifest_without(whole, cut(changed, other, limit)))
        assert {n for path, n in kept if path == files[-1].path} == set(range(rows[-1]))


def test_released_questions_are_units_of_their_own(run: Path, edit: StandIn, tmp_path: Path) -> None:
    lines = []
    for number, sample in enumerate(samples_of(DATA, 3)):
        (tmp_path / f"{number}.png").write_bytes(sample.image or b"")
        lines.append({"image": f"{number}.png", "text": "Is there a dog in the image?", "label": "no"})
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, lines)))
    folder = edit.save(tmp_path / "swap")
    asked = {"limit": 1, "shard_size": 2, "text_count": 0, "pope": [str(file)]}
    found = measures(evaluated_here(run, folder, **asked))
    assert found["pope_random_accuracy"]["n"] == 3
    # Drawn questions are still answers about images, but no POPE.
    assert "pope_popular_accuracy" not in found and found["image_locality_questions"]["n"] <= 1
    fingerprint = json.loads((folder / "evaluation.json").read_text())["fingerprint"]
    file.write_text(json.dumps(lines[0] | {"label": "yes"}))
    evaluated_here(run, folder, **asked)
    assert json.loads((folder / "evaluation.json").read_text())["fingerprint"] != fingerprint


def test_samples_behind_the_limit_count_for_reliability(run: Path, own: list[Sample], edit: StandIn, tmp_path) -> None:
    found = evaluated_here(run, edit.save(tmp_path / "swap"), data="demo", limit=8)
    captions = pq.read_table(tmp_path / "swap" / "captions.parquet").to_pylist()
    named = {row["sample_id"]: row["before"] for row in captions}
    assert measures(found)["reliability"]["n"] == sum(SOURCE in named[sample.sample_id] for sample in own) > 0


def test_it_is_what_one_process_measures(done: Done, demo: Any, own: list[Sample], edit: StandIn) -> None:
    source = open_source(str(EVALUATION))
    facts = gather_statistics((sample.objects for sample in samples_of(EVALUATION, 384)), source.translations())
    found = evaluate(demo, edit, samples_of(EVALUATION, LIMIT), measure_settings(**ASKED), own=own, statistics=facts)
    _, outcome, _ = done
    assert list(found.measures) == list(measures(outcome))
    for name, row in found.measures.items():
        assert row == pytest.approx(measures(outcome)[name], abs=1e-6, nan_ok=True), name


@pytest.fixture(scope="module")
def demo() -> Any:
    from mmray.neurons.model import load_model

    return load_model("demo")


def same(one: JobResult, other: JobResult) -> None:
    assert list(measures(one)) == list(measures(other))
    for name, row in measures(one).items():
        assert row == pytest.approx(measures(other)[name], abs=1e-6), name


def test_shards_change_nothing(done: Done, run: Path, edit: StandIn, tmp_path: Path) -> None:
    same(evaluated_here(run, edit.save(tmp_path / "edit"), shard_size=3), done[1])


def test_it_goes_on_where_it_stopped(done: Done, run: Path, edit: StandIn, tmp_path: Path) -> None:
    folder = edit.save(tmp_path / "edit")

    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done >= SHARD:
            raise StopError

    with pytest.raises(StopError):
        evaluated_here(run, folder, stop)
    (work,) = (path.parent for path in folder.glob("evaluation/*/run.json"))
    committed = {path: path.read_bytes() for path in work.glob("receipts/*.json")}
    assert len(committed) == 1
    assert not (folder / "evaluation.json").exists()
    said: list[Progress] = []
    same(evaluated_here(run, folder, said.append), done[1])
    assert said[0].done == SHARD
    assert {path: path.read_bytes() for path in committed} == committed
    # Once more, and nothing is measured again; with other settings, everything is, next to it.
    before = {path: path.stat().st_mtime_ns for path in work.glob("shards/**/*")}
    same(evaluated_here(run, folder), done[1])
    assert {path: path.stat().st_mtime_ns for path in work.glob("shards/**/*")} == before
    evaluated_here(run, folder, limit=4, text_count=0)
    assert len(list(folder.glob("evaluation/*/run.json"))) == 2


def test_edits_measured_together_are_as_by_themselves_and_the_model_is_asked_once(
    done: Done, run: Path, edit: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in between too; what is asked of the unedited model alone for the second edit are its own questions."""
    other = swap(SOURCE, "guitar", edit.purposes[0].samples)
    asked: list[str] = []
    plain = DraftVerifier.replies

    def counted(self: DraftVerifier, asks: list[Any], guesses: list[Any], *after: Any) -> Any:
        asked.extend(ask.key[0] for ask in asks if not after)
        return plain(self, asks, guesses, *after)

    monkeypatch.setattr(DraftVerifier, "replies", counted)
    alone = evaluated_here(run, other.save(tmp_path / "alone"))
    once, folders = len(asked), [edit.save(tmp_path / "edit"), other.save(tmp_path / "other")]
    jobs = [job(run, folder) for folder in folders]

    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done >= 2 * SHARD:
            raise StopError

    asked.clear()
    with pytest.raises(StopError):
        run_together(jobs, follow=stop)
    # The first shard of the data, for both edits.
    assert [len(list(folder.glob("evaluation/*/receipts/*"))) for folder in folders] == [1, 1]
    found = run_together(jobs)
    assert len(asked) < 1.5 * once
    for outcome, by_itself in zip(found, (done[1], alone), strict=True):
        same(outcome, by_itself)
        assert outcome.done == by_itself.done


def test_answers_are_kept_for_units_that_read_the_same_alone(
    run: Path, edit: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other data may have other samples of the same names."""
    said: list[object] = []
    plain = EvaluationJob.workers.__func__  # type: ignore[attr-defined]

    def watched(cls: type[EvaluationJob], jobs: Any, contexts: Any) -> list[Any]:
        def telling(worker: Any) -> Any:
            return lambda unit: (said.append(unit.group), worker(unit))[1]

        return [telling(worker) for worker in plain(cls, jobs, contexts)]

    clear = BaselineReplies.clear
    monkeypatch.setattr(BaselineReplies, "clear", lambda self: (said.append(None), clear(self))[1])
    monkeypatch.setattr(EvaluationJob, "workers", classmethod(watched))
    small = {"text_count": 2}
    run_together([job(run, edit.save(tmp_path / name), **small) for name in ("one", "other")])
    groups = [group for group in said if group]
    assert len(groups) == 2 * len(set(groups))
    assert [one == other for one, other in pairwise(groups)] == [n % 2 == 0 for n in range(len(groups) - 1)]
    # Told before the work: a group, its unit's forgetting, and the same group for the other edit.
    assert [number for number, group in enumerate(said) if not group] == list(range(1, len(said), 3))


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_units_of_several_jobs_have_numbers_of_their_own(sizes: list[int]) -> None:
    order = WorkOrder([], [], [[Unit(1)] * size for size in sizes], [], [])
    places = [(job, unit) for job, size in enumerate(sizes) for unit in range(size)]
    assert [order.locate(number) for number in range(sum(sizes))] == places


def test_other_draws_measure_nothing_again(
    run: Path, edit: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edit.save(tmp_path / "edit")
    before = measures(evaluated_here(run, folder))
    work = {path: path.stat().st_mtime_ns for path in folder.glob("evaluation/*/shards/**/*")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluation_job, "load_model", refuse)
    after = measures(evaluated_here(run, folder, draws=7))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("evaluation/*/shards/**/*")} == work
    assert {name: row["after"] for name, row in after.items()} == {name: row["after"] for name, row in before.items()}
    assert after != before
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["settings"]["draws"] == 7
    assert written["measures"] == json.loads(json.dumps(after))


def test_where_the_runs_data_has_gone(run: Path, edit: StandIn, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    for path in run.rglob("*"):
        if path.is_file():
            (moved / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (moved / path.relative_to(run)).write_bytes(path.read_bytes())
    info = json.loads((moved / "run.json").read_text())
    info["settings"]["data"] = str(tmp_path / "gone.parquet")
    (moved / "run.json").write_text(json.dumps(info))
    outcome = evaluated_here(moved, edit.save(tmp_path / "edit"), limit=4, text_count=0)
    assert outcome.complete
    assert "reliability_exact" not in measures(outcome) or measures(outcome)["reliability"]["protocol"].startswith(
        "the"
    )


@pytest.fixture
def command(mmray: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The command line, with the stand-in for the edits of the package."""
    monkeypatch.setattr(EvaluationJob.__init__, "__defaults__", (open_edit,))
    return mmray


def arguments(run: Path, folder: Path) -> list[str]:
    options = {
        "--edit": folder,
        "--data": EVALUATION,
        "--limit": 4,
        "--text-count": 2,
        "--draws": 10,
    }
    return ["evaluate", str(run), *(str(part) for pair in options.items() for part in pair), "--no-bleu", "--local"]


def test_the_command(command: Callable[..., Answer], run: Path, edit: StandIn, tmp_path: Path) -> None:
    folder = edit.save(tmp_path / "edit")
    answer = command(*arguments(run, folder))
    assert answer.status == 0, answer.err
    assert "image_locality" in answer.out
    assert "method stand-in" in answer.out
    shown = json.loads(command(*arguments(run, folder), "--json").out)
    written = json.loads((folder / "evaluation.json").read_text())
    assert shown["measures"] == written["measures"]
    assert shown["measures"]["text_only_64"]["n"] == shown["measures"]["perplexity"]["n"] == 2
    assert shown["verdict"] == written["verdict"] == verdict_of(written["measures"])
    assert f"verdict: {written['verdict']['words']}" in " ".join(answer.out.split())
    assert "image_locality_span" not in answer.out
    assert "image_locality_span" in command(*arguments(run, folder), "--all").out


def test_ground_truth_is_settled_by_the_data_and_told(run: Path, edit: StandIn, tmp_path: Path) -> None:
    """COCO has captions as well as objects, of which CHAIR takes the union; the demo's data has one caption a row."""
    known = [sample for sample in samples_of(EVALUATION, 60) if sample.objects and sample.boxes][:3]
    images = [
        {"image": {"bytes": s.image}, "objects": ["dog"], "boxes": s.boxes[:1], "caption": "A puppy and a man."}
        for s in known
        if s.boxes
    ]
    coco = write_coco(tmp_path / "coco", images)
    folder = edit.save(tmp_path / "edit")
    values = {"data": str(coco), "limit": 3, "text_count": 0, "pope_objects": 0}
    recalls, fingerprints = {}, set()
    for kind in (None, "instances", "captions"):
        found = measures(evaluated_here(run, folder, **values, ground_truth=kind))
        content = json.loads((folder / "evaluation.json").read_text())
        fingerprints.add(content["fingerprint"])
        assert content["settings"]["ground_truth"] == (kind or "union")
        assert "COCO's 80 objects" in found["chair_i"]["protocol"]
        measured = pq.read_table(folder / "captions.parquet")
        assert len(measured) >= 3
        recalls[kind] = found["recall"]["protocol"]
    assert len(fingerprints) == len(set(recalls.values())) == 3
    # One caption a row is what an image's captions are gathered from, where that is asked for.
    del values["data"]
    found = measures(evaluated_here(run, folder, **values, ground_truth="captions"))
    assert "in the image: what its captions in the data name" in found["recall"]["protocol"]
    assert found["recall"]["n"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder", "nowhere"], "--encoder nowhere: no config.json"),
        (["--synonyms", "none.json"], "--synonyms none.json: no such file"),
        (["--mmedit", "none.json"], "--mmedit none.json: no such file"),
        (["--text-questions", "none.txt"], "--text-questions none.txt: no such file"),
        (["--draws", "0"], "draws"),
    ],
)
def test_bad_input_is_one_line(
    command: Callable[..., Answer], run: Path, edit: StandIn, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in command(*arguments(run, edit.save(tmp_path / "edit")), *options).refusal


def test_what_fails_is_status_4(command: Callable[..., Answer], run: Path, edit: StandIn, tmp_path: Path) -> None:
    rows = pq.read_table(EVALUATION).slice(0, 4).to_pylist()
    rows[1]["image"]["bytes"] = b"no image"
    table = pq.read_table(EVALUATION).slice(0, 0)
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), tmp_path / "data.parquet")
    given = arguments(run, edit.save(tmp_path / "edit"))
    given[given.index(str(EVALUATION))] = str(tmp_path / "data.parquet")
    answer = command(*given)
    assert answer.status == 4
    assert "1 sample failed; mmray status says why" in answer.out


def test_units_that_never_succeed_are_quarantined(run: Path, edit: StandIn, tmp_path: Path) -> None:
    wrong = replace(edit, scale=(99, 1.0), exchange=None)
    outcome = evaluated_here(run, wrong.save(tmp_path / "edit"), limit=4, shard_size=8, text_count=1)
    # A shard of the data, one of the run's, two of questions (one drawn, eight about the words), one of general text.
    assert len(outcome.quarantined) == 5
    assert "IndexError" in outcome.quarantined[0]
    assert not outcome.complete
    assert measures(outcome)["image_locality"] == {
        "before": None,
        "after": None,
        "low": None,
        "high": None,
        "n": 0,
        "protocol": measures(outcome)["image_locality"]["protocol"],
    }


def test_an_edit_that_is_none(run: Path, tmp_path: Path) -> None:
    def refuse(uri: str) -> StandIn:
        raise InputError(f"{uri}: no edit here")

    values = SETTINGS | {"run": str(run), "edit": str(tmp_path)}
    with pytest.raises(InputError, match="no edit here"):
        run_job(EvaluationJob(evaluation_settings(values), refuse))


def decoded(run: Path, name: str, follow: Callable[[Progress], None] = lambda _: None, limit: int = 4) -> JobResult:
    values = SETTINGS | {"run": str(run), "decoding": name, "limit": limit}
    return run_job(EvaluationJob(evaluation_settings(values)), follow=follow)


def test_a_decoding_is_measured_in_an_edits_place(run: Path, demo: Any) -> None:
    # With fewer scenes it changes no caption.
    outcome = decoded(run, "no-image:8", limit=16)
    rows = pq.read_table(run / "decodings" / "no-image-8" / "captions.parquet").to_pylist()
    samples = {sample.sample_id: sample for sample in samples_of(EVALUATION, 16)}
    assert {row["sample_id"] for row in rows} == set(samples)
    assert any(row["changed"] for row in rows)
    baseline = BaselineReplies(demo, 8)
    queries = [baseline.query(samples[row["sample_id"]]) for row in rows]
    prompts, images = [query.prompt for query in queries], [query.image for query in queries]
    for column, decoding in (("before", GREEDY), ("after", decoding_of("no-image", 8.0))):
        written = generate(demo, prompts, images, decoding=decoding)
        assert [row[column] for row in rows] == [baseline.verifier.text(tokens) for tokens in written]
    found = measures(outcome)
    assert {"chair_i", "chair_s", "recall", "mean_length", "pope_random_accuracy"} <= set(found)
    words = [len(row["after"].rstrip(".").split()) for row in rows]
    assert found["mean_length"]["after"] == pytest.approx(sum(words) / len(words))
    # What an edit should do, and what depends on no decoding, is not said to have been measured.
    assert not {"reliability", "text_locality", "perplexity"} & set(found)
    assert outcome.headline["verdict"] is None
    assert all("no-image:8" in row["protocol"] for row in found.values())


def test_a_decoding_without_strength_changes_nothing_and_is_measured_once(run: Path) -> None:
    for row in measures(decoded(run, "vcd:0")).values():
        assert row["before"] == row["after"]
    said: list[Progress] = []
    decoded(run, "vcd:0", said.append)
    assert not said


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "give --edit or --decoding"),
        ({"edit": "e", "decoding": "vcd"}, "and not both"),
        ({"decoding": "vdc"}, "choose from vcd"),
        ({"decoding": "vcd", "pope": ["f"]}, "leave them out with --decoding"),
    ],
)
def test_what_is_measured_must_be_one_thing(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        evaluation_settings({"run": "r", "data": "d", **values})
