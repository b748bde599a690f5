"""MMEdit's files read as they are, and each of its metrics against a plain computation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.data.samples import Sample
from mmray.errors import InputError
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.mmedit import measure_records, read_records
from mmray.features.evaluation.settings import measure_settings
from mmray.features.evaluation.summary import summarise
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from tests.support.standin import Purpose, StandIn, swap

Write = Callable[[list[dict[str, Any]]], str]


@pytest.fixture
def write(tmp_path: Path, scenes: list[Sample]) -> Write:
    """Write records; the images a.jpg and b.jpg are next to them, in a folder of their own."""
    (tmp_path / "images").mkdir()
    for name, sample in zip("ab", scenes, strict=False):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(sample.image or b"")

    def written(records: list[dict[str, Any]]) -> str:
        (tmp_path / "vqa.json").write_text(json.dumps(records))
        return str(tmp_path / "vqa.json")

    return written


RECORD = {
    "src": "What is in the image?",
    "rephrase": "What can you see in the image?",
    "pred": "A chair",
    "alt": "A dog",
    "image": "images/a.jpg",
    "image_rephrase": "images/b.jpg",
    "loc": "What kind of thing is a dog?",
    "loc_ans": "Animal",
    "m_loc": "images/b.jpg",
    "m_loc_q": "What color is the background?",
    "m_loc_a": "Blue",
}


def test_records_are_read_as_they_are(write: Write) -> None:
    few = {name: RECORD[name] for name in ("src", "alt", "image")}
    found = read_records(write([RECORD, RECORD | {"alt": " "}, few]), None)
    assert [number for number, _ in found.records] == [0, 2]
    assert found.skipped == 1
    assert found.records[0][1] == RECORD


def test_the_first_question_that_follows_from_an_edit_is_read(write: Write) -> None:
    hops = [{"port_type": f"{n}-hop", "Q&A": {"Question": f"{n}?", "Answer": "Yes"}} for n in (1, 2)]
    ((_, record),) = read_records(write([RECORD | {"port_new": hops}]), None).records
    assert (record["portability_prompt"], record["portability_answer"]) == ("1?", "Yes")


@pytest.mark.parametrize(
    ("records", "message"),
    [([], "no record with an 'alt'"), ([{"src": "?", "alt": "x"}], "record 0 has no 'image'"), ([3], "not a list")],
)
def test_other_files_are_refused_in_one_line(write: Write, records: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_records(write(records), None)


def test_a_missing_image_costs_only_what_needs_it(before: BaselineReplies, write: Write) -> None:
    records = read_records(write([RECORD | {"image": "none.jpg"}, RECORD]), None)
    rows = measure_records(before, StandIn((Purpose(),)), records)
    assert [(row["source"], row["message"]) for row in rows.errors] == [("none.jpg", "no such image")]
    counted = {row["measure"]: 0 for row in rows.measurements}
    for row in rows.measurements:
        counted[str(row["measure"])] += 1
    assert counted["mmedit_reliability"] == counted["mmedit_text_generality"] == 1
    assert counted["mmedit_image_generality"] == counted["mmedit_text_locality"] == 2


@torch.no_grad()
@pytest.mark.parametrize("edit", [swap("chair", "dog"), StandIn((Purpose(),), scale=(6, 0.4))], ids=["swap", "noise"])
def test_metrics_against_plain_forwards(
    demo: Any, before: BaselineReplies, write: Write, scenes: list[Sample], edit: StandIn
) -> None:
    """Rewrites along `alt` without its end; MMEdit's locality along the given answer, over the whole sequence."""
    records = read_records(write([RECORD]), None)
    rows = measure_records(before, edit, records)
    found = summarise(rows.tables()["measurements"], measure_settings(draws=5))

    def logits(question: str, number: int | None, answer: str) -> tuple[list[int], int, torch.Tensor, torch.Tensor]:
        image = None if number is None else before.image(scenes[number])
        prompt = prompt_text(demo, question, "en", image=image is not None)
        tokens = tokenize_caption(demo, prompt, answer)[0]
        batch = encode(demo, [prompt], [image], [tokens], [[]])
        inputs = batch.to(demo.device, demo.network.dtype)
        old = demo.network(**inputs).logits[0]
        with edit.applied(demo):
            return tokens, batch.caption_start[0], old, demo.network(**inputs).logits[0]

    for measure, question, number in (
        ("reliability", RECORD["src"], 0),
        ("text_generality", RECORD["rephrase"], 0),
        ("image_generality", RECORD["src"], 1),
    ):
        tokens, start, *both = logits(question, number, "A dog")
        for side, one in zip(("before", "after"), both, strict=True):
            right = one[start - 1 : start - 1 + len(tokens)].argmax(dim=1) == torch.tensor(tokens)
            assert found[f"mmedit_{measure}_exact"][side] == float(right.all())
            assert found[f"mmedit_{measure}_token"][side] == pytest.approx(float(right.float().mean()))
    wrapped = f"Question: {RECORD['m_loc_q']} Short answer:"
    for measure, question, number, answer in (
        ("text_locality", RECORD["loc"], None, "Animal"),
        ("image_locality", wrapped, 1, "Blue"),
    ):
        *_, old, new = logits(question, number, answer)
        ranks = old.topk(10).indices == new.topk(10).indices
        assert found[f"mmedit_{measure}_legacy"]["after"] == pytest.approx(float(ranks.float().mean()), abs=3e-3)
        firsts = float(ranks[:, 0].float().mean())
        assert found[f"mmedit_{measure}_legacy_top1"]["after"] == pytest.approx(firsts, abs=2e-2)
        assert found[f"mmedit_{measure}"]["n"] == 1
    for measure, question, number in (
        ("random_image", RECORD["src"], 1),
        ("no_image", RECORD["src"], None),
        ("consistent_image", wrapped, 0),
    ):
        picture = None if number is None else before.image(scenes[number])
        old = demo.generate([picture], question)
        with edit.applied(demo):
            same = demo.generate([picture], question) == old
        assert found[f"mmedit_{measure}_locality"]["after"] == float(same)
    # The first scene shows a chair: asked for it, the swapped model says a dog.
    swapped = edit.exchange is not None
    assert (found["mmedit_reliability"]["before"], found["mmedit_reliability"]["after"]) == (0, float(swapped))
