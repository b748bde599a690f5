"""Small files that unfold to many pixels are never decoded all together, in evaluations, properties and edits."""

import gc
import io
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from mmray.data import images
from mmray.data.samples import Sample
from mmray.features.census.settings import CensusSettings
from mmray.features.census.shard import Captioned
from mmray.features.editing import dataset
from mmray.features.editing.dataset import EditDataset, batches
from mmray.features.evaluation import draft_verifier, evaluator, mmedit, teacher_forced_states
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.evaluate import evaluate
from mmray.features.evaluation.mmedit import measure_records, read_records
from mmray.features.evaluation.settings import measure_settings
from mmray.features.properties import captions, meaning
from mmray.features.properties.observations import Observations
from mmray.objects.statistics import ObjectStatistics
from tests.support.standin import swap

SIDE, FILES, TOGETHER = 600, 8, 2
"""Pixels of a side of each image; images; images that the budget lets be decoded together."""


@dataclass
class Held:
    """Pixels of decoded images that exist: at most, and in all."""

    most: int = 0
    decoded: int = 0
    alive: list[weakref.ref[Any]] = field(default_factory=list)

    def add(self, image: PIL.Image.Image) -> None:
        gc.collect()
        self.alive = [one for one in self.alive if one() is not None] + [weakref.ref(image)]
        held = [one() for one in self.alive]
        self.most = max(self.most, sum(one.width * one.height for one in held if one is not None))
        self.decoded += 1


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Watch what is decoded, with a budget of two of the images."""
    found, to_rgb = Held(), images.to_rgb

    def watched(*arguments: Any) -> PIL.Image.Image:
        image = to_rgb(*arguments)
        found.add(image)
        return image

    monkeypatch.setattr(images, "to_rgb", watched)
    for module in (evaluator, draft_verifier, teacher_forced_states, mmedit, dataset, meaning, captions):
        monkeypatch.setattr(module, "BUDGET", TOGETHER * SIDE * SIDE)
    gc.freeze()  # so that each collection looks at what has come since, and not at all that is imported
    yield found
    gc.unfreeze()
    assert found.decoded >= FILES
    assert SIDE * SIDE <= found.most <= TOGETHER * SIDE * SIDE


@pytest.fixture(scope="module")
def large(all_scenes: list[Sample]) -> list[Sample]:
    """Eight small files of large images: demo scenes, enlarged."""
    return [replace(sample, image=enlarged(sample.image or b"")) for sample in all_scenes[:FILES]]


def enlarged(image: bytes) -> bytes:
    written = io.BytesIO()
    PIL.Image.open(io.BytesIO(image)).quantize(8).resize((SIDE, SIDE)).save(written, "png", optimize=True)
    assert len(written.getvalue()) < 32_000
    return written.getvalue()


def test_an_evaluation_decodes_its_samples_in_parts(
    demo: Any,
    before: BaselineReplies,
    facts: ObjectStatistics,
    large: list[Sample],
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = measure_settings(text_count=0, draws=5, bleu=False)
    edit = swap(next(iter(large[0].objects or ())), "owl")
    before.clear()
    parted = evaluate(demo, edit, large, settings, baseline=before, statistics=facts)
    most = held.most
    before.clear()
    for module in (evaluator, draft_verifier, teacher_forced_states):
        monkeypatch.setattr(module, "BUDGET", 1 << 40)
    whole = evaluate(demo, edit, large, settings, baseline=before, statistics=facts)
    before.clear()
    assert held.most == FILES * SIDE * SIDE
    held.most = most
    for column in ("before", "after", "low", "high", "n"):
        found, expected = ([row[column] for row in one.measures.values()] for one in (parted, whole))
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert parted.captions.sort_by("sample_id").equals(whole.captions.sort_by("sample_id"))


def test_records_of_mmedit_are_measured_in_parts(
    before: BaselineReplies, large: list[Sample], held: Held, tmp_path: Path
) -> None:
    for number, sample in enumerate(large):
        (tmp_path / f"{number}.png").write_bytes(sample.image or b"")
    record = {"src": "What is in the image?", "alt": "A dog"}
    (tmp_path / "vqa.json").write_text(json.dumps([record | {"image": f"{n}.png"} for n in range(FILES)]))
    rows = measure_records(before, swap("cat", "dog"), read_records(str(tmp_path / "vqa.json"), None))
    before.clear()
    assert not rows.errors
    assert len({row["sample_id"] for row in rows.measurements}) == FILES


@pytest.mark.slow
def test_an_edit_decodes_what_it_learns_from_in_parts(demo: Any, large: list[Sample], held: Held) -> None:
    learnt: Any = EditDataset(demo, SimpleNamespace())  # type: ignore[arg-type]
    own = learnt.own_captions(large)
    assert held.most == TOGETHER * SIDE * SIDE
    held.most = 0
    examples = [learnt.example(sample, tokens, tokens) for sample, tokens in zip(large, own, strict=True)]
    assert held.most == 0
    found = batches(demo, examples)
    assert [len(batch.tokens) for batch in found] == [TOGETHER] * (FILES // TOGETHER)
    assert [row for batch in found for row in batch.tokens] == [list(example.tokens) for example in examples]


@pytest.mark.slow
def test_properties_write_captions_and_ask_clip_in_parts(
    demo: Any, large: list[Sample], held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Captioned(sample, "", sample.caption, [], [], []) for sample in large]
    study = SimpleNamespace(settings=CensusSettings(model="demo", data="demo", out="unused"))
    names = [sample.sample_id for sample in large]
    known = SimpleNamespace(concept="dog", ranked={"score": None}, paired=None)
    subject: Any = SimpleNamespace(study=study, model=demo, items=items, own_samples=names, inputs=known)
    texts = captions.greedy_captions(subject, items)
    assert len(texts) == FILES and all(texts)
    clip: Any = SimpleNamespace(scores=lambda pictures, text: [1.0] * len(pictures))
    monkeypatch.setattr(meaning, "tokens_in_run", lambda *_: [["a dog"]])
    found = Observations()
    meaning.image_similarity(subject, found, clip)
    assert len(found.observations) == 2 * FILES
