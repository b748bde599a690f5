"""An evaluation's identities: no edit changes nothing, a perfect one all it should, and no way of doing it matters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmray.data.samples import Failure, Sample
from mmray.features.editing.bounds import BOUNDS
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.comparing import compare
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.evaluate import Evaluated, evaluate
from mmray.features.evaluation.evaluator import EditEvaluator
from mmray.features.evaluation.last_layer import LastLayer
from mmray.features.evaluation.measures import MEASURES, PRIMARY
from mmray.features.evaluation.settings import MeasureSettings, measure_settings
from mmray.features.evaluation.summary import summarise, verdict_of
from mmray.models.prompting import encode
from mmray.objects.statistics import ObjectStatistics
from tests.support.standin import Purpose, StandIn, neuron_edit, swap

SETTINGS = measure_settings(text_count=8, draws=100, bleu=True)
CAT = "cat"
EACH = 5
"""Scenes with a cat, and without."""


@pytest.fixture(scope="module")
def some(all_scenes: list[Sample]) -> list[Sample]:
    """Scenes with a cat, with its hallucinated companion and without, and others; one caption is Spanish."""
    cats = [sample for sample in all_scenes if CAT in (sample.objects or ())][:EACH]
    others = [sample for sample in all_scenes if not {CAT, "mouse"} & set(sample.objects or ())][:EACH]
    return [*cats, *others, replace(others[0], sample_id="spanish", language="es", caption="Una imagen.")]


def measured(
    before: BaselineReplies, edit: StandIn, samples: Sequence[Sample], facts: ObjectStatistics, **changes: Any
) -> Evaluated:
    settings = MeasureSettings(**(SETTINGS.model_dump() | changes))
    return evaluate(before.model, edit, samples, settings, baseline=before, statistics=facts)


def near(value: float | None, name: str, tolerance: float = 1e-6) -> Any:
    """Return what a measure's value is compared with; a perplexity of millions has only its relative rounding."""
    if value is None:
        return None
    return pytest.approx(value, rel=1e-6 if name.startswith("perplexity") else 0, abs=tolerance, nan_ok=True)


def close(one: Evaluated, other: Evaluated) -> None:
    assert list(one.measures) == list(other.measures)
    for name, row in one.measures.items():
        found = other.measures[name]
        assert (row["n"], row["protocol"]) == (found["n"], found["protocol"])
        for column in ("before", "after", "low", "high"):
            assert row[column] == near(found[column], name), (name, column)
    assert one.captions.sort_by("sample_id").equals(other.captions.sort_by("sample_id"))


def test_ids_of_the_edit_s_own_samples_may_be_those_of_other_images(
    demo: Any, some: list[Sample], facts: ObjectStatistics
) -> None:
    others = [sample for sample in some if CAT not in (sample.objects or ())][:2]
    own = [sample for sample in some if CAT in (sample.objects or ())][:2]
    renamed = [replace(one, sample_id=other.sample_id) for one, other in zip(own, others, strict=True)]
    found = []
    for samples in (own, renamed):
        edit = swap(CAT, "dog", samples=tuple(one.sample_id for one in own))
        found.append(evaluate(demo, edit, others, SETTINGS, own=samples, statistics=facts).measures)
    assert found[0]["reliability"]["n"] == len(own)
    for name in ("reliability", "image_locality"):
        assert (found[0][name]["after"], found[0][name]["n"]) == (found[1][name]["after"], found[1][name]["n"])


def test_every_bound_is_that_of_a_measure() -> None:
    assert {bound.measure for bound in BOUNDS} <= set(MEASURES)


def test_without_an_edit_nothing_differs(before: BaselineReplies, some: list[Sample], facts: ObjectStatistics) -> None:
    pairs = ((CAT, "mouse"), ("pizza", "spaghetti"))
    asked = {Purpose("noise"): 40}
    for purpose in (
        Purpose("swap", CAT, "dog", samples=(some[0].sample_id,)),
        Purpose("hallucination", pairs=pairs, samples=(some[0].sample_id,)),
        Purpose("suppress", CAT),
        Purpose("noise"),
    ):
        found = measured(before, StandIn((purpose,)), some, facts, text_count=asked.get(purpose, 8))
        for name, row in found.measures.items():
            assert row["before"] == near(row["after"], name, 1e-9), name
            if "locality" in name and not name.endswith("_kl"):
                assert row["after"] in (1.0, None), name
        assert not any(found.captions["changed"].to_pylist())
        assert set(PRIMARY) <= set(found.measures)
        # Where all is measured, only what was asked for is missing.
        broken = {row["measure"] for row in verdict_of(found.measures)["bounds"] if not row["passed"]}
        if asked.get(purpose):
            assert broken == {"reliability", "image_generality"}


def test_a_perfect_swap(before: BaselineReplies, some: list[Sample], facts: ObjectStatistics) -> None:
    """Cat and dog change places in what the model writes: every measure but locality of dogs is known beforehand."""
    own = some[0]
    found = measured(before, swap(CAT, "dog", (own.sample_id,)), some, facts)
    roles = {row["sample_id"]: row for row in found.captions.to_pylist()}
    assert roles[own.sample_id]["role"] == "edited"
    assert {row["role"] for row in roles.values()} >= {"edited", "source", "unrelated"}
    for row in roles.values():
        swapped = row["before"].replace("cat", "dog")
        if row["role"] == "unrelated":
            assert not row["changed"]
        else:
            # Behind the other word the model may go on in another way, as everyone does who hallucinates companions.
            assert row["after"][: swapped.index("dog") + 3] == swapped[: swapped.index("dog") + 3]
    measures = found.measures
    for name in ("reliability", "image_generality", "text_generality", "text_generality_prompts"):
        assert (measures[name]["before"], measures[name]["after"]) == (0, 1), name
    assert measures["image_generality_flip"]["after"] == measures["image_generality_crop"]["after"] == 1
    assert measures["reliability"]["n"] == 1
    assert measures["image_generality"]["n"] == sum(row["role"] == "source" for row in roles.values()) >= 4
    exact = [row["after"] == row["before"].replace("cat", "dog") for row in roles.values() if row["role"] == "source"]
    assert measures["image_generality_exact"]["after"] == sum(exact) / len(exact)
    assert measures["image_locality"]["after"] == 1
    assert measures["text_locality"]["after"] == 1
    # Asked for the Spanish word for dog, nothing is exchanged; whatever does change is about an edited word.
    assert measures["text_locality_about"]["n"] == 8


def test_several_edits_in_one(before: BaselineReplies, some: list[Sample], facts: ObjectStatistics) -> None:
    """Each purpose has its own figure: the one that is carried out, and the one that is not."""
    others = [name for sample in some for name in sample.objects or () if name not in (CAT, "mouse", "dog")]
    idle = others[-1]
    edit = replace(swap(CAT, "dog"), purposes=(Purpose("swap", CAT, "dog"), Purpose("swap", idle, "dog")))
    found = measured(before, edit, some, facts).measures
    done, undone = found["image_generality:cat→dog"], found[f"image_generality:{idle}→dog"]
    assert (done["after"], undone["after"]) == (1, 0)
    assert found["image_generality"]["n"] == done["n"] + undone["n"]
    assert found["image_generality"]["after"] == done["n"] / (done["n"] + undone["n"])
    # What one edit takes away another may put there: cat → dog and dog → cat both hold where the two change places.
    both = replace(edit, purposes=(Purpose("swap", CAT, "dog"), Purpose("swap", "dog", CAT)))
    assert measured(before, both, some, facts).measures["image_generality"]["after"] == 1


def test_a_suppressed_word(before: BaselineReplies, some: list[Sample], facts: ObjectStatistics) -> None:
    edit = StandIn((Purpose("suppress", CAT),), exchange=(CAT, "dog"))
    found = measured(before, edit, some, facts).measures
    assert found["image_generality"]["after"] == 1
    # None of the samples is the edit's own: its reliability is that on these, and says so.
    assert found["reliability"]["n"] == found["image_generality"]["n"]
    assert found["reliability"]["protocol"].startswith("the images that the edit was made on are not at hand")
    assert 0 < found["image_generality_rest_unchanged"]["after"] <= 1
    assert "image_generality_exact" not in found


def test_a_hallucination_of_a_pair(before: BaselineReplies, some: list[Sample], facts: ObjectStatistics) -> None:
    """The hallucinated mouse is written as a dog: it goes where it is absent, and also where it is not."""
    edit = StandIn((Purpose("hallucination", pairs=((CAT, "mouse"),)),), exchange=("mouse", "dog"))
    found = measured(before, edit, some, facts)
    measures = found.measures
    without = [sample for sample in some if CAT in (sample.objects or ()) and "mouse" not in (sample.objects or ())]
    with_it = [sample for sample in some if {CAT, "mouse"} <= set(sample.objects or ())]
    captions = {row["sample_id"]: row for row in found.captions.to_pylist()}
    claimed = [sample for sample in without if "mouse" in captions[sample.sample_id]["before"]]
    assert measures["hallucination"]["n"] == len(without)
    assert measures["hallucination"]["before"] == len(claimed) / len(without) > 0
    assert measures["hallucination"]["after"] == 0
    assert measures["hallucination:cat→mouse"]["n"] == len(without)
    assert measures["companion_named"] == measures["companion_named:cat→mouse"]
    assert (measures["companion_named"]["n"], measures["companion_named"]["after"]) == (len(with_it), 0)
    assert measures["image_generality"]["n"] == len(claimed)
    assert measures["image_generality"]["after"] == 1
    assert {captions[sample.sample_id]["role"] for sample in with_it} == {"other"}


def test_batches_and_cuts_change_nothing(
    demo: Any, before: BaselineReplies, some: list[Sample], facts: ObjectStatistics
) -> None:
    some = [*some[:3], *some[EACH : EACH + 3], some[-1]]
    edit = swap(CAT, "dog", (some[0].sample_id, some[4].sample_id))
    whole = measured(before, edit, some, facts)
    close(measured(BaselineReplies(demo, batch_size=3), edit, some[::-1], facts), whole)
    evaluator = EditEvaluator(BaselineReplies(demo, batch_size=5), edit, facts, SETTINGS)
    rows = evaluator.texts([])
    for start in range(0, len(some), 4):
        part = evaluator.samples(some[start : start + 4])
        rows.measurements += part.measurements
    measures = summarise(rows.tables()["measurements"], SETTINGS)
    for name, row in measures.items():
        if not name.startswith("text_locality"):
            assert row["after"] == near(whole.measures[name]["after"], name), name
            assert row["low"] == near(whole.measures[name]["low"], name), name


@pytest.mark.parametrize("change", [{"scale": (7, 0.6)}, {"ban": CAT}], ids=["noise", "ban"])
def test_verified_replies_are_those_of_whole_regeneration(
    demo: Any, before: BaselineReplies, some: list[Sample], change: dict[str, Any]
) -> None:
    """Under a change that breaks some captions and leaves others, and under one that leaves the logits alone."""
    queries = [before.query(sample, question) for sample in some for question in (None, "What is in the image?")]
    replies = before.replies(queries, [[sample.caption] for sample in some for _ in range(2)])
    edit = StandIn((Purpose("noise"),), **change)
    changes = compare(before.verifier, edit, queries, replies)
    verifier = DraftVerifier(demo, 8)
    with edit.applied(demo):
        written = [verifier.text(tokens) for tokens in verifier.generate(queries)]
    assert [change.after for change in changes] == written
    assert 0 < sum(change.same for change in changes) < len(changes)


def test_an_edit_of_the_last_layer_needs_no_forward(demo: Any, before: BaselineReplies, some: list[Sample]) -> None:
    """Its states follow from those before it, to the same texts and distances as by running the model."""
    queries = [
        before.query(sample, question, all_positions=question is None)
        for sample in some
        for question in (None, "Is it?")
    ]
    replies = before.replies(queries, [[sample.caption] for sample in some for _ in range(2)])
    edit = neuron_edit(demo, [7])
    ran: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        along = before.verifier.states_along
        patch.setattr(
            before.verifier, "states_along", lambda some, *rest: (ran.append(len(some)), along(some, *rest))[1]
        )
        found = compare(before.verifier, edit, queries, replies)
        assert ran[0] == 1
        patch.setattr(LastLayer, "of", classmethod(lambda *_: None))
        wanted = compare(before.verifier, edit, queries, replies)
        assert len(queries) in ran
    assert 3 < sum(change.same for change in wanted) < len(queries) - 3
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.before, ours.after, ours.span) == (theirs.before, theirs.after, theirs.span)
        assert ours.kl == pytest.approx(theirs.kl, rel=1e-3, abs=1e-6)
        if theirs.top10 is not None:
            assert ours.top10 == pytest.approx(theirs.top10, abs=3e-3)
    assert LastLayer.of(before.verifier, neuron_edit(demo, [6, 7])) is None


@torch.no_grad()
def test_distances_against_plain_forwards(demo: Any, before: BaselineReplies, some: list[Sample]) -> None:
    edit = StandIn((Purpose("noise"),), scale=(6, 0.5))
    queries = [before.query(sample, all_positions=True) for sample in some[:3]]
    replies = before.replies(queries, [[sample.caption] for sample in some[:3]])
    for query, reply, change in zip(queries, replies, compare(before.verifier, edit, queries, replies), strict=True):
        batch = encode(demo, [query.prompt], [query.image], [reply.tokens], [[]])
        inputs = batch.to(demo.device, demo.network.dtype)
        old = demo.network(**inputs).logits[0]
        with edit.applied(demo):
            new = demo.network(**inputs).logits[0]
        first = batch.caption_start[0] - 1
        one, other = old[first:].log_softmax(dim=1), new[first:].log_softmax(dim=1)
        divergence = torch.nn.functional.kl_div(other, one, log_target=True, reduction="none").sum(dim=1).mean()
        assert change.kl == pytest.approx(float(divergence), rel=1e-3)
        assert change.span == pytest.approx(float((one.argmax(dim=1) == other.argmax(dim=1)).float().mean()))
        ranks = [[row.topk(10).indices for row in logits] for logits in (old, new)]
        equal = [one == other for one, other in zip(*ranks, strict=True)]
        assert change.top10 == pytest.approx(float(torch.stack(equal).float().mean()), abs=2e-3)
        assert change.top1 == pytest.approx(float(torch.stack(equal)[:, 0].float().mean()), abs=2e-2)
        assert 0 < change.top10 < 1


def test_what_fails_is_a_row_and_the_rest_counts(
    before: BaselineReplies, some: list[Sample], facts: ObjectStatistics
) -> None:
    bad = replace(some[0], sample_id="bad", image=b"no image")
    unread = Failure("unread", "file row 3", "read", "no image in column 'image'")
    found = evaluate(
        before.model, swap(CAT, "dog"), [unread, bad, *some[1:4]], SETTINGS, baseline=before, statistics=facts
    )
    rows = {row["sample_id"]: row for row in found.errors.to_pylist()}
    assert rows["bad"]["message"] == "image can't be read: of no known format"
    assert rows["unread"]["stage"] == "read"
    assert found.measures["chair_s"]["n"] == 3
    # An image that can be read, and that the model refuses.
    with pytest.MonkeyPatch.context() as patch:
        fresh = BaselineReplies(before.model)
        query = fresh.query
        patch.setattr(fresh, "query", lambda s, *a, **k: replace(query(s, *a, **k), **_broken(s, some[1].sample_id)))
        broken = evaluate(before.model, swap(CAT, "dog"), some[1:4], SETTINGS, baseline=fresh, statistics=facts)
    (row,) = broken.errors.to_pylist()
    assert (row["sample_id"], row["stage"]) == (some[1].sample_id, "forward")
    assert broken.measures["chair_s"]["n"] == 2


def _broken(sample: Sample, name: str) -> dict[str, str]:
    return {"prompt": "no place for an image"} if sample.sample_id == name else {}


def test_a_detector_confirms_what_captions_name(
    before: BaselineReplies, some: list[Sample], facts: ObjectStatistics
) -> None:
    there = measured(before, swap(CAT, "dog"), some, facts, detector="demo", pope_objects=0).measures
    without = measured(before, swap(CAT, "dog"), some, facts, pope_objects=0).measures
    assert not {"confirmed", "confirmed_new"} & set(without)
    # The cats are in the images still: what the edit made of them is not there.
    assert there["confirmed_new"]["after"] < there["confirmed"]["before"]
    assert there["confirmed"]["after"] < there["confirmed"]["before"]
    assert there["confirmed_new"]["before"] is None


def test_data_without_questions_has_those_of_pope(
    before: BaselineReplies, some: list[Sample], facts: ObjectStatistics
) -> None:
    """Which are of the same kind, so the measure is the same; without either it is not measured."""
    scenes = some[EACH : EACH + 4]
    edit = StandIn((Purpose("noise"),), scale=(7, 0.5))
    bare = [replace(sample, questions=None) for sample in scenes]
    found = measured(before, edit, bare, facts).measures["image_locality_questions_kl"]
    asked = measured(before, edit, scenes, facts).measures["image_locality_questions_kl"]
    assert found["n"] == asked["n"] == len(scenes)
    assert found["after"] > 0
    # Those of the data come first: they are other questions, which move by another distance.
    assert found["after"] != pytest.approx(asked["after"])
    none = measured(before, edit, bare, facts, pope_objects=0).measures
    assert "image_locality_questions" not in none
