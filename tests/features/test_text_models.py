"""A text-only model in every feature: the LAPE pipeline on a corpus, windows, an edit, and refusals."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mmray as package
from mmray.engine import run as run_job
from mmray.errors import InputError
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.settings import evaluation_settings
from mmray.features.pipeline.job import pipeline_settings
from mmray.runs.run import open_run
from mmray.terminal.config import read_config
from tests.support.local_jobs import KEPT_TEXT, census_here, pipeline_here
from tests.support.text_models import WORDS, corpus

LAPE = Path(__file__).parents[2] / "jobs/configs/papers/lape.yaml"
WINDOW = 32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lape(text_model, tmp_path_factory):
    """Return the data and the run of the paper's pipeline; edits may be added to the run."""
    folder = tmp_path_factory.mktemp("lape")
    data = corpus(folder / "texts.jsonl", texts=16)
    overrides = [f"model={text_model('learner')}", f"data={data}", f"out={folder / 'run'}", f"census.window={WINDOW}"]
    # A tiny model has few neurons.
    overrides += [f"steps.{step}.selectivity.rate=0.1" for step in (0, 1)]
    overrides += ["census.nouns=textblob", "census.shard_size=20"]
    assert pipeline_here(read_config(LAPE, overrides)).complete
    return data, folder / "run"


def test_every_token_counts_once_whatever_the_windows(lape, text_model):
    data, folder = lape
    run, tokenizer = open_run(folder), AutoTokenizer.from_pretrained(text_model("learner"))
    rows = list(map(json.loads, data.read_text().splitlines()))
    tokens = {row["id"]: tokenizer(row["text"])["input_ids"] for row in rows}
    assert max(map(len, tokens.values())) > 3 * WINDOW
    captions = run.table("captions").to_pylist()
    texts = {row["id"]: row["text"] for row in rows}
    for name, text in texts.items():
        own = {row["sample_id"]: row for row in captions if row["sample_id"].partition("#")[0] == name}
        parts = [own[name]] if name in own else [own[f"{name}#w{number}"] for number in range(len(own))]
        assert "".join(part["caption"] for part in parts) == text
        assert len(parts) == 1 or len({part["image"] for part in parts}) == 1
        assert (len(parts) > 1) == (len(tokens[name]) > WINDOW)
    expected = Counter()
    for row in rows:
        expected[row["language"]] += len(tokens[row["id"]])
    activity = run.sql("select label, n_tokens from activity where label_kind = 'language' and layer = 0 and unit = 0")
    assert {row["label"]: row["n_tokens"] for row in activity.to_pylist()} == expected
    assert run.table("errors").num_rows == 0
    # A text counts once among the skipped, however many windows it has.
    assert run.status().skipped == {"no noun": 3 * 16}


def test_the_pipeline_gives_the_paper_s_table_with_controls(lape, tmp_path):
    run = open_run(lape[1])
    rows = [row for row in run.table("interventions").to_pylist() if row["measure"] == "perplexity"]
    assert {row["method"] for row in rows} == {"lape", "contribution"}
    assert {row["control"] for row in rows} == {"selected", "random", "shuffled"}
    assert all(row["low"] <= row["change"] <= row["high"] and row["n"] > 0 for row in rows)
    chosen = [row for row in rows if row["method"] == "contribution"]
    cells = {(row["control"], row["masked"], row["label"]): row["change"] for row in chosen}
    for language in WORDS:
        others = [cells["selected", language, other] for other in WORDS if other != language]
        assert cells["selected", language, language] > 2 * max(map(abs, others))
        assert cells["selected", language, language] > 3 * abs(cells["random", language, language])
    steering = [row for row in run.table("steering").to_pylist() if row["method"] == "contribution"]
    assert {row["label_before"] for row in steering} == {"en"}
    assert sum(row["label_after"] == "fr" for row in steering) > len(steering) / 2
    page = Path(package.write_report(run, tmp_path / "report.html")).read_text()
    assert "change of the perplexity" in page
    assert '"measure":"perplexity"' in page.replace(": ", ":")


def test_windows_of_a_text_are_held_out_together(lape):
    from mmray.features.selectivity.plan import plan_labels
    from mmray.features.selectivity.settings import selectivity_settings

    run = open_run(lape[1])
    plan = plan_labels(selectivity_settings({"run": str(run.uri), "held_out": 0.4}), run, hold_out=True)
    sides = {}
    for name in plan.labelled:
        sides.setdefault(name.partition("#")[0], set()).add(name in plan.held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert {True} in sides.values()


def test_an_edit_changes_how_texts_go_on(lape, tmp_path):
    data, folder = lape
    run = open_run(folder)
    light: dict[str, Any] = {"text_weight": 0.1, "caption_weight": 0.1, "neurons": 200, "samples": 16, "kept": 24}
    made = package.edit(run, source="dog", target="bread", keep_text=KEPT_TEXT, **light)
    assert made.facts["validation"]["reliability"] >= 0.5
    # Whole texts, however many windows they have.
    assert all("#" not in name for name in made.purpose.samples)
    model = package.load_model(run.info["settings"]["model"])
    before = [weight.clone() for weight in model.network.parameters()]
    with made.applied(model):
        assert not all(map(torch.equal, before, model.network.parameters()))
    assert all(map(torch.equal, before, model.network.parameters()))
    made.save(tmp_path / "edit")
    asked = {"run": str(folder), "edit": str(tmp_path / "edit"), "data": str(data), "local": True}
    settings = evaluation_settings(asked | {"limit": 24, "text_count": 2, "longest": 16})
    measures = run_job(EvaluationJob(settings)).headline["measures"]
    assert measures["reliability"]["n"] == len(made.purpose.samples)
    assert measures["reliability"]["after"] >= 0.5 > measures["reliability"]["before"]
    assert measures["image_locality"]["n"] > 0
    assert measures["chair_i"]["n"] == 0


def test_data_with_images_is_read_as_texts(text_model, tmp_path):
    assert census_here(text_model("gpt2"), "demo", tmp_path / "run", limit=12, nouns="textblob").complete
    run = open_run(tmp_path / "run")
    assert {row["image"] for row in run.table("captions").to_pylist() if "#" not in row["sample_id"]} == {None}
    assert run.rank(next(iter(run.concepts)), 3).num_rows == 3


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("saliency", ()),
        ("properties", ()),
        ("hallucination", ()),
        ("edit", ("--reduce-hallucination", "--out", "OUT")),
    ],
)
def test_what_needs_an_image_is_refused_in_one_line(lape, mmray, tmp_path, command, options):
    answer = mmray(command, lape[1], *(tmp_path / "edit" if option == "OUT" else option for option in options))
    assert "reads text only" in answer.refusal
    assert "needs a model that takes images" in answer.refusal


@pytest.mark.parametrize(
    "settings", [{"captions": "generate"}, {"module": "vision"}, {"score": "gradient"}, {"image_column": "image"}]
)
def test_a_census_refuses_settings_that_need_images(text_model, tmp_path, settings):
    option = "--" + next(iter(settings)).replace("_", "-")
    with pytest.raises(InputError, match=f"reads text only; {option}"):
        census_here(text_model("gpt2"), "demo", tmp_path / "run", **settings)


def test_short_names_of_a_pipeline_stand_for_the_census_s():
    values = read_config(LAPE, ["model=M", "data=D", "out=O", "steps.1.selectivity.rate=0.5"])
    settings = pipeline_settings(values)
    assert [settings.census[name] for name in ("model", "data", "out")] == ["M", "D", "O"]
    assert settings.steps[1]["selectivity"]["rate"] == 0.5
    with pytest.raises(InputError, match="5 is no item of the list, which has 2"):
        read_config(LAPE, ["steps.5.selectivity.rate=0.5"])
    with pytest.raises(InputError, match="steps is a list"):
        read_config(LAPE, ["steps.rate=0.5"])
