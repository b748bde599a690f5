"""The census as a job: each unit is a shard of samples, and the merge makes the tables of a run.

Decoding the neurons is a second job of one unit, because its result depends on the model alone. The same workers do it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

from mmray.data.limits import check_columns
from mmray.data.shards import Manifest, read_shard
from mmray.data.source import Source
from mmray.engine import Job, JobResult, Output, Parts, Plan, Progress, Unit, UnitResult, Worker, run_together
from mmray.errors import InputError
from mmray.features.census.activity import without_repeats
from mmray.features.census.decoding import decode_neurons
from mmray.features.census.estimate import describe, first_rows
from mmray.features.census.inputs import check_apart, open_data, open_inputs, text_settings
from mmray.features.census.merging import APPENDED, DECODED, RANGE, RunMerge, concept_cuts, read_decoded
from mmray.features.census.partial_merge import PartialMerge, partial_merges, put_together
from mmray.features.census.ranges import SharedCuts, cut_parts, neuron_ranges, pieces_of
from mmray.features.census.settings import CensusSettings, shard_size_of
from mmray.features.census.shard import ShardAnalysis
from mmray.features.census.tables import PARTS, TABLES
from mmray.models.loading import LoadedModel, describe_model, digest, from_anywhere, resolve, takes_images
from mmray.neuron_names import NeuronNames
from mmray.neurons.concepts import TAGGERS, NounSource
from mmray.neurons.model import load_model
from mmray.neurons.row_sharing import RowSharing
from mmray.runs import RunFolder
from mmray.runs.lease import Lease
from mmray.runs.pieces import join
from mmray.runs.receipts import skipped

P = TypeVar("P")
Follow = Callable[[Progress], None]


@dataclass(frozen=True)
class CensusContext:
    """What workers and the merge need in addition to settings and shards."""

    nouns: NounSource
    widths: tuple[int, ...]
    """Neurons per layer."""
    module_widths: dict[str, list[int]]
    """Neurons per layer of the modules that `--module` adds."""
    names: NeuronNames
    decoding: str
    """Folder of the decoding job, with the tokens that each neuron writes."""


@dataclass(frozen=True, kw_only=True)
class CensusResult:
    """Counts of a finished census."""

    out: str
    samples: int
    failures: int
    skipped: dict[str, int]
    """Samples that were kept but have no noun to rank neurons for, by reason. They are not failures."""
    analysed: int
    """Samples that `failures` and `skipped` refer to: all, or after a refresh those that it analysed."""
    occurrences: int
    quarantined: dict[int, str]
    """Shard → why it was quarantined."""
    seconds: float
    already: bool
    """Whether earlier calls had done all of it."""

    @property
    def complete(self) -> bool:
        """Whether nothing failed or was quarantined."""
        return not self.failures and not self.quarantined


class ModelJob(Job[CensusSettings, P]):
    """A job of a census's workers, which load the model once for all of them."""

    # An actor scores the next shard while the sums of the last one are reduced and committed.
    overlaps = True

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.out

    @abstractmethod
    def worker_with(self, model: LoadedModel, context: P) -> Worker:
        """Return the worker that turns a unit into its parts."""

    def worker(self, context: P) -> Worker:
        """Load the model, and return the worker that turns a unit into its parts."""
        return self.workers([self], [context])[0]

    @classmethod
    def workers(cls, jobs: Sequence[Job[Any, Any]], contexts: Sequence[Any]) -> list[Worker]:
        """Return one worker per job, all with the same model."""
        settings = jobs[0].settings
        # All jobs have the census's settings.
        model = load_model(settings.model, settings.dtype, trust_remote_code=settings.trust_remote_code)
        pairs = zip(jobs, contexts, strict=True)
        # The engine's signature allows any job; run_planned hands over ModelJobs only.
        return [job.worker_with(model, context) for job, context in pairs if isinstance(job, ModelJob)]


class CensusJob(ModelJob[CensusContext]):
    """Captures, scores and reduces every neuron over each shard's samples, and ranks neurons per concept."""

    name = "census"
    parts: ClassVar[dict[str, pa.Schema]] = {
        name: schema for name, schema in PARTS.items() if name not in (DECODED, "errors")
    }

    def __init__(self, settings: CensusSettings) -> None:
        """Settle how many samples a shard has, and that a text-only model reads no images.

        Raises InputError for a model that can't be described, and for settings that need images of a text-only one.
        """
        if not takes_images(settings.model, trust_remote_code=settings.trust_remote_code):
            settings = text_settings(settings)
        if settings.shard_size is None:
            widths = describe_model(settings.model, trust_remote_code=settings.trust_remote_code)["widths"]
            settings = settings.model_copy(update={"shard_size": shard_size_of(sum(widths))})
        super().__init__(settings)

    @property
    def root(self) -> str:
        """The run itself: it holds one census, so a census with other settings is refused there."""
        return self.target

    def folder(self, fingerprint: str) -> str:
        """Return the run."""
        return self.target

    def plan(self) -> Plan[CensusContext]:
        """Plan the shards as the data is cut now, or as the run has them if it began with these settings."""
        source, manifest, nouns = open_inputs(self.settings)
        check_apart(self.settings.out, source)
        plan = self.plan_for(source, manifest, nouns)
        # Opened before any work, so that a wrong address is reported at once.
        folder = RunFolder.at(self.settings.out)
        begun = folder.info()
        if begun is None:
            check_columns(source, manifest)
        elif begun["fingerprint"] == self.settings.fingerprint(plan.digests):
            # A refresh may have added shards, so the run's own manifest counts.
            manifest = _begun_manifest(folder) or manifest
            plan = replace(plan, units=_units(manifest), manifest=manifest.to_json())
        return plan

    def plan_for(self, source: Source, manifest: Manifest, nouns: NounSource) -> Plan[CensusContext]:
        """Return the plan for these shards. The payload of a unit is its shard."""
        settings = self.settings
        model = describe_model(settings.model, trust_remote_code=settings.trust_remote_code)
        decoding, model_digest = DecodingJob(settings), digest(resolve(settings.model))
        digests = {
            "model": model_digest,
            "data": manifest.digest,
            "nouns": nouns.digest(generated=settings.captions == "generate"),
        }
        return Plan(
            _units(manifest),
            digests,
            CensusContext(
                nouns=nouns,
                widths=tuple(model["widths"]),
                module_widths=model.get("module_widths", {}),
                names=NeuronNames.of(model["experts"]),
                # The merge reads the other job's part, so it must know that job's folder beforehand.
                decoding=decoding.folder(settings.fingerprint(decoding.plan_for(model_digest).digests)),
            ),
            run_info={
                "model": model,
                "data": {"kind": source.kind, "columns": source.columns.model_dump(), "samples": manifest.samples},
                "nouns": nouns.kind,
            },
            manifest=manifest.to_json(),
        )

    def worker_with(self, model: LoadedModel, context: CensusContext) -> Worker:
        """Return the worker that analyses a shard."""
        source, sharing = open_data(self.settings), RowSharing(model)
        ranges = len(neuron_ranges([context.widths, *context.module_widths.values()]))
        cuts = SharedCuts(self.target)

        def analyse(unit: Unit) -> Callable[[], UnitResult]:
            shard = unit.payload
            analysis = ShardAnalysis(model, self.settings, context.nouns, shard.shard_id, sharing)
            analysis.collect(read_shard(source, shard))

            def finish() -> UnitResult:
                tables = analysis.tables()
                tables["activity"] = without_repeats(tables["activity"])
                pieces = cut_parts(tables, ranges, cuts.read() if ranges > 1 else ())
                return UnitResult(pieces, analysis.skipped, sorted(analysis.notes))

            return finish

        return analyse

    def partial_merges(self, plan: Plan[CensusContext], parts: Parts) -> Sequence[Sequence[PartialMerge]]:
        """Return the jobs that merge a large run, by step."""
        one = plan.context
        return partial_merges(self.settings, parts, one.widths, one.module_widths, one.names, one.decoding)

    def merge(self, plan: Plan[CensusContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the tables of the run."""
        if steps := self.partial_merges(plan, parts):
            concepts, certified, among = put_together(steps, plan.context.module_widths, output)
        else:
            concepts, certified, among = self._merge_all(plan.context, parts, output)
        receipts = parts.receipts.values()
        return {
            "samples": sum(receipt.samples for receipt in receipts),
            "occurrences": sum(receipt.occurrences for receipt in receipts),
            "concepts": concepts,
            # Kept as a number, so that status need not read the table.
            "certified": certified / among if among else None,
        }

    def _merge_all(self, context: CensusContext, parts: Parts, output: Output) -> tuple[int, int, int]:
        """Merge everything in this process; returns the number of concepts, and `certified_counts`."""
        merge = RunMerge(
            context.widths,
            read_decoded(context.decoding),
            self.settings.top_k,
            context.module_widths,
            concept_cuts(parts, -(-parts.size("concepts") // RANGE)),
            context.names,
        )
        for name in APPENDED:
            # A table without any row must still replace that of an earlier merge.
            output.table(name, TABLES[name].empty_table())
        for unit in parts.by_unit(lambda receipt: [part for name in PARTS for part in pieces_of(receipt, name)]):
            # Written shard by shard, so that memory never holds the occurrences of the whole run.
            for name, rows in merge.add(join(unit).__getitem__).items():
                output.table(name, rows)
        for name, table in merge.tables():
            output.table(name, table)
        certified, among = merge.rankings.certified
        return merge.rankings.ranked, certified, among


class DecodingJob(ModelJob[None]):
    """Decodes every neuron of a census: the tokens that its row of W_out promotes and suppresses most."""

    name = "decoding"
    parts: ClassVar[dict[str, pa.Schema]] = {DECODED: PARTS[DECODED]}

    def plan(self) -> Plan[None]:
        """Return a plan of one unit for the settings' model."""
        return self.plan_for(digest(resolve(self.settings.model)))

    def plan_for(self, model: str) -> Plan[None]:
        """Return the plan for a model, given its digest."""
        return Plan([Unit(0)], {"model": model}, None)  # size 0: the unit adds no samples to the progress

    def worker_with(self, model: LoadedModel, context: None) -> Worker:
        """Return the worker that decodes all neurons."""
        return lambda _: UnitResult({DECODED: decode_neurons(model, fold_norm=self.settings.fold_norm)})

    def merge(self, plan: Plan[None], parts: Parts, output: Output) -> dict[str, Any]:
        """Make no table: the census's merge reads the part."""
        return {}


def run_census(
    settings: CensusSettings, follow: Follow = lambda _: None, warn: Callable[[str], None] = lambda _: None
) -> CensusResult:
    """Run a census, or resume one that stopped, and return its counts.

    Calls `follow` after every committed shard, and `warn` with problems of the data such as captions in languages that
    the noun tagger does not know. Raises InputError for anything wrong with the set-up, before any work.
    """
    # Workers have other working directories, so a relative path must become absolute.
    settings = settings.model_copy(update={"model": from_anywhere(settings.model)})
    job = CensusJob(settings)
    settings, plan = job.settings, job.plan()
    warned = plan.context.nouns.kind not in TAGGERS or settings.captions != "dataset"

    def follow_and_warn(progress: Progress) -> None:
        nonlocal warned
        # Not before the run has begun: a finished run needs no warning, and a refused one should say nothing else.
        if not warned and progress.done < progress.total:
            rows = first_rows(open_data(settings), Manifest.from_json(plan.manifest or b""))
            for line in describe(*rows, plan.context.nouns).warnings:
                warn(line)
            warned = True
        follow(progress)

    return outcome_of(settings, run_planned(settings, plan, follow_and_warn))


def run_planned(
    settings: CensusSettings, plan: Plan[CensusContext], follow: Follow, lease: Lease | None = None
) -> JobResult:
    """Run a planned census, and the decoding of its neurons by the same workers."""
    decoding = DecodingJob(settings)
    jobs: list[Job[Any, Any]] = [CensusJob(settings), decoding]
    return run_together(jobs, plans=[plan, decoding.plan_for(plan.digests["model"])], follow=follow, lease=lease)[0]


def outcome_of(settings: CensusSettings, done: JobResult, since: int = 0) -> CensusResult:
    """Return the counts of the run; failures, skips and quarantines are those of shards from number `since` on."""
    receipts = done.parts.receipts
    recent = [receipt for number, receipt in receipts.items() if number >= since]
    return CensusResult(
        out=settings.out,
        samples=done.done,
        failures=sum(receipt.failures for receipt in recent),
        skipped=skipped(recent),
        analysed=sum(receipt.samples for receipt in recent),
        occurrences=sum(receipt.occurrences for receipt in receipts.values()),
        quarantined={shard: reason for shard, reason in done.quarantined.items() if shard >= since},
        seconds=done.seconds,
        already=done.already_done,
    )


def _units(manifest: Manifest) -> list[Unit]:
    return [Unit(shard.samples, shard) for shard in manifest.shards]


def _begun_manifest(folder: RunFolder) -> Manifest | None:
    """Return the shards of a run that has begun; None if its driver died before it had written them."""
    try:
        return Manifest.from_json(folder.manifest())
    except FileNotFoundError:
        return None
    except InputError as error:
        raise InputError(
            f"{folder.store.uri}: the manifest is damaged ({error}); restore it, or start a new run"
        ) from error
