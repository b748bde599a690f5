"""The job that evaluates an edit. A unit is a shard of data, of texts or of records.

EDIT/evaluation/FINGERPRINT/      the measurements of each unit
EDIT/evaluation.json              the measures of the last complete evaluation
EDIT/captions.parquet             its captions before and after
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from mmray import engine
from mmray.data.samples import Sample
from mmray.data.shards import read_shard
from mmray.engine import Job, Output, Parts, Plan, UnitResult, Worker
from mmray.features.census.inputs import open_data
from mmray.features.editing.edit import open_edit
from mmray.features.editing.files import CAPTIONS_FILE, EVALUATION_FILE
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.decoding_evaluator import DecodingEvaluator, MeasuredDecoding
from mmray.features.evaluation.edit_requests import EDITED
from mmray.features.evaluation.evaluator import EditEvaluator
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.plan import EvaluationContext, EvaluationUnit, open_measured, plan_evaluation
from mmray.features.evaluation.pope import part_of
from mmray.features.evaluation.queries import Edit
from mmray.features.evaluation.settings import EvaluationSettings
from mmray.features.evaluation.summary import summarise, verdict_of
from mmray.features.evaluation.tables import PARTS
from mmray.models.decodings import decoding_of
from mmray.neurons.model import load_model
from mmray.runs.run import open_run
from mmray.runs.tables import to_bytes

Opener = Callable[[str], Edit]
"""Opens the edit of a folder; tests replace it."""


class EvaluationJob(Job[EvaluationSettings, EvaluationContext]):
    """Measures what an edit changed, and what it left alone; or what another decoding does to replies about images.

    Edits of one run that are evaluated together share the model and its replies before them. Their settings may differ
    in the edit alone.
    """

    name = "evaluation"
    parts: ClassVar[dict[str, pa.Schema]] = {name: PARTS[name] for name in ("measurements", "captions")}

    def __init__(self, settings: EvaluationSettings, opener: Opener = open_edit) -> None:
        super().__init__(settings)
        self.opener = opener

    @property
    def target(self) -> str:
        """The edit's folder, or the decoding's in the run."""
        return self.settings.subject

    def plan(self) -> Plan[EvaluationContext]:
        """Plan the data, questions and records to measure on."""
        return plan_evaluation(self.settings, open_run(self.settings.run), self.subject())

    def subject(self) -> Edit:
        """Open the edit, or what stands in its place."""
        if self.settings.decoding is not None:
            return MeasuredDecoding(decoding_of(self.settings.decoding))
        return self.opener(self.settings.subject)

    def worker(self, context: EvaluationContext) -> Worker:
        """Load the model and the edit, and return the function that measures a unit."""
        return self.workers([self], [context])[0]

    @classmethod
    def workers(
        cls, jobs: Sequence[Job[EvaluationSettings, EvaluationContext]], contexts: Sequence[EvaluationContext]
    ) -> list[Worker]:
        """Load the model once; units that read the same share its replies, whichever edit they measure."""
        census, settings = contexts[0].census, contexts[0].settings
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        shared = _SharedBaseline(BaselineReplies(model, settings.batch_size, settings.prompt, settings.longest))
        return [shared.worker(job, context) for job, context in zip(jobs, contexts, strict=True)]

    def merge(self, plan: Plan[EvaluationContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the measures with their intervals, and the captions before and after."""
        settings = plan.context.settings
        measured, captions = _gathered(plan, parts)
        measures = summarise(measured, settings, in_sample=settings.data == plan.context.own.data)
        if settings.decoding is not None:
            # Measures of what an edit should do have no sample.
            measures = {name: row for name, row in measures.items() if row["n"]}
            for row in measures.values():
                row["protocol"] = f"after: {decoding_of(settings.decoding)}, before: {row['protocol']}"
        # The bounds are those of edits.
        found = verdict_of(measures) if settings.decoding is None else None
        receipts = parts.receipts.values()
        content = {
            "verdict": found,
            "measures": measures,
            "cost": plan.context.cost,
            "data": settings.data,
            "run": settings.run,
            "samples": sum(receipt.samples for receipt in receipts),
            "failures": sum(receipt.failures for receipt in receipts),
            "quarantined": parts.folder.reasons(parts.receipts),
            # Neither of the two is among the result settings, but whoever reads the file needs them.
            "settings": settings.result_settings() | settings.model_dump(include={"draws", "detector"}),
            "fingerprint": settings.fingerprint(plan.digests),
            "seconds": round(sum(receipt.seconds for receipt in receipts), 3),
        }
        # Captions first: evaluation.json says that both are there.
        output.file(CAPTIONS_FILE, to_bytes(captions))
        output.file(EVALUATION_FILE, json.dumps(content, indent=1, ensure_ascii=False, default=str).encode())
        return {"edit": self.settings.subject, "verdict": found, "measures": measures, "cost": plan.context.cost}


class _SharedBaseline:
    """The unedited model's replies, which the workers of all edits of an actor share."""

    def __init__(self, baseline: BaselineReplies) -> None:
        self.baseline = baseline
        self.group: object = None

    def worker(self, job: Job[EvaluationSettings, EvaluationContext], context: EvaluationContext) -> Worker:
        """Return the function that measures the units of one edit."""
        assert isinstance(job, EvaluationJob)
        edit = job.subject()
        known = context.statistics, context.settings
        if isinstance(edit, MeasuredDecoding):
            evaluator: EditEvaluator = DecodingEvaluator(self.baseline, edit, *known)
        else:
            evaluator = EditEvaluator(self.baseline, edit, *known)

        def measure(unit: engine.Unit) -> UnitResult:
            if unit.group != self.group:
                # Units of another group share no sample, so the replies kept would only grow.
                self.baseline.clear()
                self.group = unit.group
            return UnitResult(_measured(context, evaluator, unit.payload).tables())

        return measure


def _measured(context: EvaluationContext, evaluator: EditEvaluator, unit: EvaluationUnit) -> MeasurementBuffer:
    part = slice(unit.start, unit.start + unit.samples)
    if unit.kind == "texts":
        return evaluator.texts(context.texts[part])
    if unit.kind == "held_out":
        return evaluator.held_out(context.held_out[part])
    if unit.kind == "records":
        assert context.records is not None
        return evaluator.records(replace(context.records, records=context.records.records[part]))
    if unit.kind == "pope":
        assert context.pope is not None
        return evaluator.released(part_of(context.pope, part))
    if unit.kind == "data":
        return evaluator.samples(list(read_shard(open_measured(context.census), context.manifest.shards[unit.number])))
    assert context.own_manifest is not None
    found = read_shard(open_data(context.own), context.own_manifest.shards[unit.number])
    wanted = set(unit.names)
    return evaluator.samples([s for s in found if isinstance(s, Sample) and s.sample_id in wanted], own=True)


def _gathered(plan: Plan[EvaluationContext], parts: Parts) -> tuple[pa.Table, pa.Table]:
    """Return the measurements of all units, and the captions, each sample once."""

    def read(name: str, *, own: bool) -> pa.Table:
        kinds = {number: plan.units[number].payload.kind for number in parts.receipts}
        some = {number: receipt for number, receipt in parts.receipts.items() if (kinds[number] == "own") == own}
        return replace(parts, receipts=some).table(name)

    captions = read("captions", own=False)
    # An image of the edit that the data holds counts there, and not again as one of the run's.
    known = captions.filter(pc.equal(captions["role"], EDITED))["image"].unique()
    measured, captions = (
        pa.concat_tables([data, own.filter(pc.invert(pc.is_in(own["image"], known)))])
        for data, own in ((read(name, own=False), read(name, own=True)) for name in ("measurements", "captions"))
    )
    # Reversed: the first row of a sample counts.
    rows = {row["sample_id"]: row for row in reversed(captions.to_pylist())}
    kept = [rows[name] for name in sorted(rows)]
    return measured, pa.Table.from_pylist(kept, schema=PARTS["captions"])
