"""Edits of single records: measured as the paper defines it, undone to the byte, and in a chain."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmray.data.samples import image_digest
from mmray.features.editing import published
from mmray.features.evaluation.mmedit import Records, read_records
from mmray.features.mmedit.benchmark import Benchmark, Chain
from mmray.features.mmedit.editors import DEFAULT
from mmray.features.mmedit.fine_tuning import vision_block
from mmray.features.mmedit.record_edits import RecordTask, edit_neurons, prepare_record
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.model import NeuronModel

pytestmark = pytest.mark.slow


def one(file: Path, number: int) -> Records:
    records = read_records(str(file), None)
    return replace(records, records=records.records[number : number + 1])


def task_of(records: Records) -> RecordTask:
    ((number, record),) = records.records
    names = {record[name] for name in ("image", "image_rephrase", "m_loc")}
    pictures = {name: Path(records.folder, name).read_bytes() for name in names}
    digests = frozenset(str(image_digest(one)) for one in pictures.values())
    return RecordTask(f"E-VQA {number}", record["src"], record["alt"], pictures[record["image"]], digests)


class Paper:
    """The five measures of a record by the formulas of Cheng et al. 2023, section 3.3, and of the released code."""

    def __init__(self, model: NeuronModel, records: Records) -> None:
        self.model, self.folder = model, records.folder
        ((_, self.record),) = records.records

    @torch.no_grad()
    def along(self, question: str, image: str | None, answer: str, context: str) -> tuple[list[int], torch.Tensor]:
        """Return the answer's tokens, and the logits of a plain forward along them at every position."""
        picture = None if image is None else Image.open(Path(self.folder, image)).convert("RGB")
        asked = f"{context}Prompt: {question}" if context else question
        prompts = [prompt_text(self.model, text, "en", image=picture is not None) for text in (question, asked)]
        tokens = tokenize_caption(self.model, prompts[0], answer)[0]
        batch = encode(self.model, [prompts[1]], [picture], [tokens], [[]])
        return tokens, self.model.network(**batch.to(self.model.device, self.model.network.dtype)).logits[0]

    def rewritten(self, prompt: str, image: str, context: str) -> float:
        """1 if every token of the target is the likeliest, teacher-forced."""
        tokens, logits = self.along(self.record[prompt], self.record[image], self.record["alt"], context)
        return float(logits[-len(tokens) - 1 : -1].argmax(1).tolist() == tokens)

    def likeliest(self, prompt: str, image: str, answer: str, ranks: int, context: str = "") -> torch.Tensor:
        question = self.record[prompt] if not image else f"Question: {self.record[prompt]} Short answer:"
        _, logits = self.along(question, self.record[image] if image else None, self.record[answer], context)
        return logits.topk(ranks).indices


LOCALITY = {
    "text_locality_legacy_top1": ("loc", "", "loc_ans", 1),
    "image_locality_legacy": ("m_loc_q", "m_loc", "m_loc_a", 10),
}
REWRITES = {
    "reliability": ("src", "image"),
    "text_generality": ("rephrase", "image"),
    "image_generality": ("src", "image_rephrase"),
}


@pytest.mark.parametrize("method", ["rank-one", "ft-l", "ft-v", "ike"])
def test_the_five_measures_are_the_paper_s(benchmark: Benchmark, files: tuple[Path, Path], method: str) -> None:
    records, model = one(files[0], 1), benchmark.session.model
    outcomes = benchmark.single("E-VQA", records, [method])
    assert not outcomes.rows["errors"]
    found = {row["measure"]: row["after"][0] / row["after"][1] for row in outcomes.rows["outcomes"]}
    paper, prepared = Paper(model, records), prepare_record(benchmark.session, task_of(records))
    edit = benchmark.edit(outcomes, 1, prepared, method)
    assert edit is not None
    record = paper.record
    context = f"New Fact: {record['src']} {record['alt']}\n" if method == "ike" else ""
    before = {name: paper.likeliest(*fields) for name, fields in LOCALITY.items()}
    with edit.applied(model):
        for name, fields in REWRITES.items():
            assert found[f"mmedit_{name}_exact"] == paper.rewritten(*fields, context)
        after = {name: paper.likeliest(*fields, context) for name, fields in LOCALITY.items()}
    for name in LOCALITY:
        # A longer prompt is cut at its beginning.
        same = before[name] == after[name][-len(before[name]) :]
        assert found[f"mmedit_{name}"] == pytest.approx(float(same.float().mean()), abs=3e-3)
    assert method == "ike" or found["mmedit_reliability_exact"] == 1


def test_every_edit_is_undone_to_the_byte(
    benchmark: Benchmark, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "STEPS", 2)
    model = benchmark.session.model
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    outcomes = benchmark.single("E-IC", one(files[1], 0), DEFAULT)
    made = {row["method"]: row for row in outcomes.rows["mmedit_edits"]}
    assert set(made) == set(DEFAULT)
    assert not outcomes.rows["errors"]
    assert all((row["norm"] > 0) == (method != "ike") for method, row in made.items())
    assert all(before[name].equal(weight) for name, weight in model.network.state_dict().items())
    assert not any(weight.requires_grad for weight in model.network.parameters())


def test_nothing_is_learned_from_images_that_a_record_names(benchmark: Benchmark, files: tuple[Path, Path]) -> None:
    session, record = benchmark.session, task_of(one(files[0], 0))
    images = [image_digest(example.image) for example in session.base.every if example.image is not None]
    leaky = replace(record, others=frozenset(digest for digest in images[:1] if digest))
    for task, leaked in ((record, 1), (leaky, 0)):
        kept = session.kept_for(task, ())
        digests = [image_digest(example.image) for example in kept.every if example.image is not None]
        assert (images[0] in digests) == bool(leaked)


def test_neurons_are_those_that_write_the_old_answer(benchmark: Benchmark, files: tuple[Path, Path]) -> None:
    """Their contribution to the old token minus that to the new, where the answers part, from one plain forward."""
    model, prepared = benchmark.session.model, prepare_record(benchmark.session, task_of(one(files[0], 1)))
    example, layer = prepared.examples[0], len(model.widths) - 1
    assert example.rejected is not None
    start, old = example.rejected
    projection = model.network.get_submodule(model.projections[layer].path)
    seen: list[torch.Tensor] = []
    with projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0])):
        picture = Image.open(Path(one(files[0], 1).folder, one(files[0], 1).records[0][1]["image"])).convert("RGB")
        batch = encode(model, [example.prompt], [picture], [list(example.tokens)], [[]])
        with torch.no_grad():
            model.network(**batch.to(model.device, model.network.dtype))
    unembedding = model.network.get_output_embeddings().weight
    direction = (unembedding[old] - unembedding[example.tokens[start]]) @ projection.weight
    scores = seen[0][batch.caption_start[0] + start - 1] * direction
    edit = edit_neurons(benchmark.session, prepared, "plain")
    assert set(edit.unit.tolist()) == set(scores.topk(len(edit.unit)).indices.tolist())
    assert edit.layer.unique().tolist() == [layer]


def test_the_vision_block_is_the_projector(benchmark: Benchmark) -> None:
    model = benchmark.session.model
    assert vision_block(model) is model.network.get_submodule("model.multi_modal_projector")


def test_edits_of_a_chain_stay_until_all_are_measured(benchmark: Benchmark, files: tuple[Path, Path]) -> None:
    records, model = read_records(str(files[0]), None), benchmark.session.model
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    outcomes = benchmark.chain("E-VQA", records, "ft-l", 2)
    assert {row["edits"] for row in outcomes.rows["mmedit_edits"]} == {1, 2, 3}
    measured = {(row["edits"], row["sample_id"]) for row in outcomes.rows["outcomes"]}
    assert measured == {(2, "mmedit: 0"), (2, "mmedit: 1")}
    # The second edit begins where the first left the model: together they are not those of single records.
    edits = []
    for number in (0, 1):
        with Chain(tuple(edits)).applied(model):
            prepared = prepare_record(benchmark.session, task_of(one(files[0], number)), edited=bool(edits))
            edits.append(benchmark.edit(outcomes, number, prepared, "ft-l"))
    paper = Paper(model, one(files[0], 0))
    with Chain(tuple(edits)).applied(model):
        expected = paper.rewritten("src", "image", "")
    (row,) = (
        row
        for row in outcomes.rows["outcomes"]
        if (row["measure"], row["sample_id"]) == ("mmedit_reliability_exact", "mmedit: 0")
    )
    assert row["after"][0] == expected
    assert all(before[name].equal(weight) for name, weight in model.network.state_dict().items())


def test_a_record_whose_image_is_missing_fails_alone(benchmark: Benchmark, files: tuple[Path, Path]) -> None:
    records = one(files[0], 0)
    ((number, record),) = records.records
    broken = replace(records, records=((number, json.loads(json.dumps(record)) | {"image": "none.png"}),))
    outcomes: Any = benchmark.single("E-VQA", broken, ["ft-l"])
    assert not outcomes.rows["outcomes"]
    assert "none.png" in outcomes.rows["errors"][0]["message"]
