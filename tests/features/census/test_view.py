"""What is shown can be read: numbers and names whole at any usual width, and the data's own brackets as they are."""

import copy
import re
from dataclasses import replace
from typing import get_args

import pyarrow as pa
import pytest
from rich.cells import cell_len

from mmray.features.census.cost import CensusEstimate, DataSample, PartBytes, Volume, WorkerMemory
from mmray.features.census.view import concept_title, neuron, plan, ranking, status, summary
from mmray.neurons.attribution import FUNCTIONS
from mmray.neurons.scores import SCORES, Score
from mmray.report.definitions import definitions
from mmray.runs.concepts import ORDERS
from mmray.runs.run import CERTIFICATES, Run
from mmray.runs.tables import with_columns
from tests.support.terminal import shown

WIDTHS = (80, 100, 120)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_ranking_keeps_numbers_and_names_whole(run: Run, width: int) -> None:
    for concept in list(run.concepts)[:5]:
        rows = run.rank(concept, 10)
        words = [["rhinoceros", "reconnaissance", "西兰花", "counterrevolutionary"] * 2] * len(rows)
        rows = rows.set_column(rows.schema.get_field_index("tokens"), "tokens", [words])
        lines = shown(ranking(rows, concept_title(run, rows)), width)
        assert len(lines) == 2 + len(rows)
        assert lines[0].split(" · ")[0] == concept
        for line, row in zip(lines[2:], rows.to_pylist(), strict=True):
            assert cell_len(line) <= width
            rank, name, score, specific, share, tokens = re.split(r"\s+", line.strip(), maxsplit=5)
            assert rank.rstrip("?") == str(row["rank"])
            assert name == row["neuron"]
            assert (score, specific) == (f"{row['score']:.3f}", f"{row['specific']:.3f}")
            assert share == f"{row['share']:.0%}"
            assert tokens.removeprefix("− ").startswith("rhinoceros  reconnaissance")
            assert tokens.endswith("…")


def test_ranks_that_are_not_certain_are_marked(run: Run) -> None:
    rows = run.rank(next(iter(run.concepts)), 2)
    certain = shown(ranking(rows, concept_title(run, rows)), 80)
    doubtful = certify(rows, certified=[False, True])
    marked = shown(ranking(doubtful, concept_title(run, rows)), 80)
    assert not any("?" in line.split()[0] for line in certain[2:])
    assert [line.split()[0] for line in marked[2:]] == ["1?", "2"]


def certify(rows: pa.Table, **certificates: list[bool]) -> pa.Table:
    """Return the rows with other certificates."""
    for name, values in certificates.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, [values])
    return rows


@pytest.mark.parametrize("by", ORDERS)
def test_the_certificate_shown_is_that_of_the_order_shown(run: Run, by: str) -> None:
    concept = next(iter(run.concepts))
    certificates = {"certified": [False] * 3, "certified_specific": [False] * 3, "certified_selective": [False] * 3}
    certain = certify(run.rank(concept, 3, by), **{name: [True] * 3 for name in certificates})
    doubtful = certificates | ({CERTIFICATES[by]: [True, False, True]} if by in CERTIFICATES else {})
    for rows, marks in ((certain, ["", "", ""]), (certify(certain, **doubtful), ["", "?" * (by != "share"), ""])):
        lines = shown(ranking(rows, concept_title(run, rows), by), 100)[2:]
        # A rank is the place in the order shown, which for all but `share` is a column.
        assert [line.split()[0] for line in lines] == [f"{rank}{mark}" for rank, mark in enumerate(marks, 1)]
        assert [line.split()[1] for line in lines] == rows["neuron"].to_pylist()


def test_a_run_of_an_earlier_version_shows_no_certificate_that_it_lacks(run: Run) -> None:
    concept = next(iter(run.concepts))
    whole = run.rank(concept, 3, "specific")
    rows = with_columns(whole.drop_columns(["certified_specific", "n_images"]), whole.schema)
    lines = shown(ranking(rows, concept_title(run, rows), "specific"), 100)
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3"]


def test_a_ranking_says_of_how_many_images_it_is(run: Run) -> None:
    images = {row["sample_id"]: row["image"] for row in run.table("captions").to_pylist()}
    for concept, n in list(run.concepts.items())[:5]:
        own = [row["sample_id"] for row in run.table("occurrences").to_pylist() if row["concept"] == concept]
        different = len({images[name] for name in own})
        text = concept_title(run, run.rank(concept, 1)).plain
        assert f" · {n} occurrence{'s' * (n > 1)} in {different} image{'s' * (different > 1)} · " in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_neuron_keeps_numbers_and_samples_whole(run: Run, width: int) -> None:
    facts = run.neuron(run.rank(next(iter(run.concepts)), 1)["neuron"][0].as_py())
    lines = shown(neuron(facts), width)
    assert lines[0] == facts["neuron"]
    text = "\n".join(lines)
    for row in facts["examples"]:
        token = (
            "image, {} of {}".format(*row["image_token"])
            if row["image_token"]
            else row["caption"][slice(*row["token"])]
        )
        place = f"{row['activation']:.2f} +{token.strip()} +{row['sample_id']}"
        assert re.search(place, text), place
    for part in ("writes +", "writes −", "activation", "concepts"):
        assert any(line.startswith(part) for line in lines)


def test_neurons_of_negative_activation_are_marked(run: Run) -> None:
    """They write what their row suppresses, and the table says so of both."""
    concept = next(iter(run.concepts))
    rows = run.rank(concept, 10)
    neurons = {row["neuron"]: row for row in run.table("neurons").to_pylist()}
    lines = shown(ranking(rows, concept_title(run, rows)), 200)
    assert "−: by negative activation" in lines[1]
    for line, row in zip(lines[2:], rows.to_pylist(), strict=True):
        negative = row["activation"] < 0
        facts = neurons[row["neuron"]]
        assert row["tokens"] == facts["suppressed" if negative else "tokens"]
        assert ("%  − " in line) == negative
    assert {row["activation"] < 0 for row in rows.to_pylist()} == {True, False}
    for row in rows.to_pylist():
        lines = shown(neuron(run.neuron(row["neuron"])), 400)
        (concepts,) = [line for line in lines if line.startswith("concepts")]
        assert (f"− {concept} (#{row['rank']}," in concepts) == (row["activation"] < 0)
        assert f"{concept} (#{row['rank']}," in concepts


def test_brackets_in_captions_are_no_markup(run: Run) -> None:
    (caption,) = [text for text in run.table("captions")["caption"].to_pylist() if "[/b]" in text]
    facts = run.neuron("L0.u0")
    facts["examples"][0] |= {"caption": caption, "sample_id": "a[/b]c"}
    lines = shown(neuron(facts), 200)
    assert any(caption in line and "a[/b]c" in line for line in lines)


def test_long_names_of_samples_leave_room_for_captions(run: Run) -> None:
    facts = run.neuron("L0.u0")
    for row in facts["examples"]:
        row |= {"sample_id": "folder/" * 20, "caption": "A dog."}
    lines = [line for line in shown(neuron(facts), 80) if re.match("highest|lowest", line)]
    assert len(lines) == len(facts["examples"])
    assert all("A dog." in line for line in lines)


def test_status_says_why_work_took_longer(run: Run) -> None:
    noted = replace(run.status(), cost=replace(run.status().cost, notes=("captions of an image are in rows apart",)))
    assert "slower    captions of an image are in rows apart" in shown(status(noted, [], "x"), 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_status_says_what_failed_and_why(run: Run, width: int) -> None:
    text = " ".join(" ".join(shown(status(run.status(), run.failures(), "runs/[b]x"), width)).split())
    assert "runs/[b]x · finished" in text
    assert "3 done, 0 pending, 0 quarantined of 3" in text
    assert "24 of 24" in text
    assert "2 failed" in text
    doubtful = replace(run.status(), certified=0.094)
    shares = " ".join(" ".join(shown(status(doubtful, [], "x"), width)).split())
    assert "ranks 9% of the ten highest by score certified, of concepts with 5 or more occurrences" in shares
    earlier = replace(run.status(), certified=None)
    assert not any(line.startswith("ranks") for line in shown(status(earlier, [], "x"), width))
    for row in run.failures():
        assert row["stage"] in text
        assert row["source"] in text


MEMORY = WorkerMemory(weights=14 * 10**9, batch=2 * 10**9, sums=10**9)
VOLUME = Volume(1, 500, 100.0, 50.0, 10.0**6, PartBytes(0.0, 0.0, 0.0, 0.0))


def test_a_plan_names_the_gpus_that_a_worker_fits_on() -> None:
    rows = DataSample(64, 0, "", 64, 160, 0, (("dog", 9),), {"English": 64}, False, {}, "objects")
    for times, said in ((1, "fits A10G, L4 (24 GB), "), (9, "needs --gpus-per-worker 2 or more")):
        memory = WorkerMemory(times * MEMORY.weights, MEMORY.batch, MEMORY.sums)
        known = CensusEstimate(500, 1, 80.0, 10**6, 1.0, 0.1, 1, 2.5, VOLUME, memory, 8192, 8192, rows)
        text = " ".join(" ".join(shown(plan(known), 80)).split())
        assert (
            f"memory about {14 * times + 3} GB per worker on a GPU (weights {14 * times}, batch 2, sums 1): {said}"
            in text
        )


@pytest.mark.parametrize(("kept", "said"), [(8192, False), (2048, True)])
def test_a_plan_says_what_is_kept_where_that_is_not_all(kept: int, said: bool) -> None:
    rows = DataSample(64, 0, "", 64, 160, 0, (("dog", 9),), {"English": 64}, False, {}, "objects")
    lines = shown(plan(CensusEstimate(500, 1, 80.0, 10**6, 1.0, 0.1, 1, 2.5, VOLUME, MEMORY, 8192, kept, rows)), 80)
    text = " ".join(" ".join(lines).split())
    assert ("kept 2,048 of 8,192 neurons per concept and shard" in text) == said
    assert all(cell_len(line) <= 80 for line in lines)


def test_a_summary_shows_each_concept(run: Run) -> None:
    concepts = list(run.concepts)[:3]
    text = "\n".join(shown(summary(run, concepts), 80))
    assert all(f"{concept} · " in text for concept in concepts)


@pytest.mark.parametrize(
    ("score", "folded", "told"),
    [
        ("contribution", False, "contribution in logits before the final norm"),
        ("contribution", True, "contribution in logits after the final norm"),
        ("effect", True, "effect in log-odds"),
        ("gradient", True, "gradient in logits"),
        ("activation", True, "activation"),
    ],
)
def test_a_ranking_is_told_in_the_unit_of_its_score(run: Run, score: str, folded: bool, told: str) -> None:
    run = copy.copy(run)
    run.info = run.info | {"settings": run.info["settings"] | {"score": score, "fold_norm": folded}}
    assert concept_title(run, run.rank(next(iter(run.concepts)), 1)).plain.endswith(f" · {told}")
    (definition,) = [row["text"] for row in definitions(run) if row["name"] == "score"]
    assert f"of the {told.replace(' in ', ', in ')}: " in definition
    assert ("about half" in definition) == (told == "contribution in logits after the final norm")


def test_every_score_is_a_function_of_one_forward_or_takes_a_backward_pass() -> None:
    assert set(FUNCTIONS) == {name for name, kind in SCORES.items() if not kind.backward}
    assert get_args(Score) == tuple(SCORES)
