"""What a plan says of the first rows: unreadable ones, languages, nouns, and what is wrong with them."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import mmray
from mmray.data.samples import Failure, Sample
from mmray.features.census.cost import CensusEstimate
from mmray.features.census.estimate import PROMPT_TOKENS, describe, first_rows
from mmray.features.census.inputs import open_inputs
from mmray.features.census.job import CensusJob, run_census
from mmray.features.census.planning import TIMED, plan_census
from mmray.features.census.settings import census_settings, shard_size_of
from mmray.features.census.view import plan as shown
from mmray.neurons.concepts import NounSource
from tests.bench.nouns import OTHERS
from tests.support.samples import picture, png

HANTA = NounSource("hanta")
ENGLISH = ["A dog on a bench.", "Two dogs run.", "A man with a dog and a cat"]
SPANISH = OTHERS["es"].strip().splitlines()


def samples(captions: Sequence[str], language: str | None = None) -> list[Sample]:
    return [Sample(str(number), f"row {number}", None, text, language) for number, text in enumerate(captions)]


def test_rows_are_described() -> None:
    failure = Failure("x", "data.parquet row 3", "read", "no image in column 'image'")
    seen = describe(samples(ENGLISH), [failure], HANTA)
    assert (seen.rows, seen.unreadable, seen.captions) == (4, 1, 3)
    assert (seen.nouns, seen.without_nouns) == (6, 0)
    assert seen.frequent[0] == ("dog", 3)
    assert seen.languages == {"English": 3}
    assert seen.warnings == ("1 of the first 4 rows can't be read: data.parquet row 3: no image in column 'image'",)
    assert describe(samples(ENGLISH), [], HANTA).warnings == ()


def test_captions_of_a_language_that_the_tagger_does_not_know_are_warned_of() -> None:
    seen = describe(samples(ENGLISH * 2 + SPANISH), [], HANTA)
    assert seen.languages["English"] == 6
    assert sum(seen.unknown_languages.values()) == len(SPANISH)
    (line,) = seen.warnings
    assert line.startswith("captions seem to be in Spanish and other languages (")
    assert "(10 of 16): --nouns hanta finds no nouns there; give --nouns FILE" in line
    assert "--language" in line
    (line,) = describe(samples([caption.strip().splitlines()[0] for caption in OTHERS.values()]), [], HANTA).warnings
    assert line.startswith("captions seem to be in other languages (")
    # Where a column names it there is nothing to guess.
    (line,) = describe(samples(SPANISH, "es"), [], HANTA).warnings
    assert line.startswith("captions are in Spanish (10 of 10)")
    assert "--language" not in line
    # A list of nouns knows every language, and a few captions are not worth a word.
    listed = NounSource("lexicon", lexicon={None: frozenset({"gato", "perro", "dog"})})
    assert not describe(samples(SPANISH), [], listed).unknown_languages
    assert describe(samples(ENGLISH * 10 + SPANISH[:2]), [], HANTA).warnings == ()


def test_data_without_nouns_or_without_readable_rows_is_warned_of() -> None:
    listed = NounSource("lexicon", lexicon={None: frozenset({"horse"})})
    assert describe(samples(ENGLISH), [], listed).warnings == ("no noun in 3 of 3 captions by --nouns lexicon",)
    failures = [Failure(str(n), f"row {n}", "read", "no caption") for n in range(5)]
    seen = describe([], failures, HANTA)
    assert seen.warnings == ("none of the first 5 rows can be read: row 0: no caption",)
    assert seen.captions == 0
    # The model is to write captions where the data has none.
    assert describe(samples(["", " "]), [], HANTA).warnings == ()


def write(path: Path, captions: Sequence[str | None]) -> str:
    rows = [{"image": {"bytes": png(picture(n))}, "caption": text} for n, text in enumerate(captions)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def text(plan: CensusEstimate, price: float | None = None) -> str:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(shown(plan, price))
    return capture.get()


def test_a_plan_says_what_it_looked_at(tmp_path: Path) -> None:
    data = write(tmp_path / "data.parquet", [*SPANISH, None])
    settings = census_settings({"model": "demo", "data": data, "out": "run"})
    plan = plan_census(settings)
    said = text(plan)
    assert "looked at 11 rows: 1 unreadable, 10 without a noun; languages as guessed: Spanish" in said
    assert "warning   1 of the first 11 rows can't be read: " in said
    assert "warning   captions seem to be in Spanish" in said
    # A batch has at least its scores; sums of few concepts are small.
    assert plan.memory.weights == 2 * plan.parameters
    assert plan.memory.batch >= 32 * 8 * plan.neurons * plan.occurrences
    assert plan.memory.sums < 10**8
    assert plan.memory.gpus[0] == "T4 (16 GB)"
    fp32 = plan_census(settings.model_copy(update={"dtype": "fp32"})).memory
    assert fp32.weights == 2 * plan.memory.weights
    # The language is told, and a tagger that does not know it is still none.
    plan = plan_census(settings.model_copy(update={"language": "es"}))
    assert plan.sample.languages == {"Spanish": 10}
    assert "captions are in Spanish (10 of 10)" in text(plan)


@pytest.mark.slow
def test_a_census_warns_before_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, said = write(tmp_path / "data.parquet", [*SPANISH[:5], "A dog."]), []

    def run(**settings: object) -> None:
        asked = {"model": "demo", "data": data, "out": "run", "local": True, **settings}
        run_census(census_settings(asked), warn=said.append)

    run()
    assert len(said) == 1
    assert said[0].startswith("captions seem to be in Spanish")
    # A finished run has no work left, and a list of nouns is for any language.
    run()
    (tmp_path / "nouns.txt").write_text("perro\nmujer\n")
    run(out="other", nouns="nouns.txt")
    assert len(said) == 1
    with pytest.warns(UserWarning, match="seem to be in Spanish"):
        mmray.census(model="demo", data=data, out="third", local=True)


def test_the_language_of_all_captions_is_that_of_samples_without_one(tmp_path: Path) -> None:
    rows = [{"caption": text, "language": language} for text, language in zip("abc", ["fr", None, ""], strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    settings = {"model": "demo", "data": str(tmp_path / "data.parquet"), "out": "run", "image_column": "none"}
    for language in ("es", None):
        source, manifest, _ = open_inputs(census_settings({**settings, "language": language}))
        first, _ = first_rows(source, manifest)
        assert [row.language for row in first] == ["fr", language, language]


@pytest.mark.slow
def test_a_measured_plan_is_the_time_of_its_first_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = census_settings({"model": "demo", "data": "demo", "out": "run", "limit": 150, "batch_size": 64})
    began = time.perf_counter()
    plan = plan_census(settings, measure=True)
    took = time.perf_counter() - began
    timing = plan.timing
    assert timing is not None and timing.samples == TIMED
    assert 0 < timing.seconds < took
    assert timing.phases["forward"] == max(timing.phases.values())
    assert sum(timing.phases.values()) <= timing.seconds
    assert plan.worker_hours == pytest.approx(150 * timing.seconds / TIMED / 3600)
    assert f"measured on {TIMED} samples" in text(plan)
    assert list(tmp_path.iterdir()) == []
    # Twice the price, twice the total; without --measure the arithmetic gives the hours.
    guess = plan_census(settings)
    assert guess.timing is None and guess.worker_hours == guess.teraflops / guess.speed / 3600
    totals = [re.search(r"price +about ([\d.,]+) at", text(guess, price)) for price in (1e6, 2e6)]
    one, two = (float(found[1].replace(",", "")) for found in totals if found)
    assert two == pytest.approx(2 * one, abs=0.02) and one == pytest.approx(1e6 * guess.worker_hours, abs=0.01)


def test_shards_are_larger_where_what_they_write_per_neuron_is_much(tmp_path: Path) -> None:
    assert [shard_size_of(neurons) for neurons in (8_192, 32_000, 64_000, 32 * 11_008)] == [500, 500, 1_000, 4_000]
    asked = {"model": "demo", "data": "demo", "out": str(tmp_path)}
    # Settled before the fingerprint is taken, so that a run resumes with the same shards.
    assert CensusJob(census_settings(asked)).settings == census_settings(asked | {"shard_size": 500})
    assert CensusJob(census_settings(asked | {"shard_size": 7})).settings.samples_per_shard == 7


def test_captions_of_an_image_share_its_tokens(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(picture(n))}, "caption": ENGLISH} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    asked = {"model": "demo", "data": str(tmp_path / "lists.parquet"), "out": str(tmp_path / "run")}
    shared = plan_census(census_settings(asked))
    assert shared.samples == 4 * len(ENGLISH)
    # Backward passes need rows apart.
    apart = plan_census(census_settings(asked | {"score": "effect"}))
    prompt = 64 + PROMPT_TOKENS  # the demo's image tokens
    assert apart.positions - shared.positions == pytest.approx(prompt * (1 - 1 / len(ENGLISH)))
