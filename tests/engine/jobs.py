"""Every job of the package at a size that a test can run again and again, and what such a run left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmray.demo import DATA
from mmray.detector.alignment import save_alignment
from mmray.engine import Executor, Job, JobResult, checked, run
from mmray.features.alignment.settings import alignment_settings
from mmray.features.alignment.training import open_pair
from mmray.features.alignment.validation import ValidationJob, plan_validation
from mmray.features.census.job import CensusJob, DecodingJob
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.editing.edit import open_edit
from mmray.features.editing.job import EditJob, NamedEditSettings
from mmray.features.editing.settings import EditSettings
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.settings import evaluation_settings
from mmray.features.hallucination.bias_job import BiasJob
from mmray.features.hallucination.contrast import Moments
from mmray.features.hallucination.doses import Condition
from mmray.features.hallucination.inputs import open_claims
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.mentions import QUANTITIES
from mmray.features.hallucination.neuron_jobs import CandidateContext, CandidateJob, ContrastJob, DoseContext, DoseJob
from mmray.features.hallucination.perturb_job import PerturbJob
from mmray.features.hallucination.settings import (
    bias_settings,
    hallucination_settings,
    neuron_settings,
    perturbation_settings,
)
from mmray.features.mmedit.job import MmeditJob
from mmray.features.mmedit.settings import mmedit_settings
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.settings import saliency_settings
from mmray.features.select.job import SelectionJob
from mmray.features.select.settings import selection_settings
from mmray.features.selectivity.job import SumsJob, Tests, TestsJob
from mmray.features.selectivity.masks import Mask
from mmray.features.selectivity.plan import plan_labels
from mmray.features.selectivity.settings import selectivity_settings
from mmray.models.loading import digest, resolve
from mmray.neuron_names import PLAIN
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from mmray.runs.snapshots import newest
from mmray.storage import open_store
from tests.support.local_jobs import KEPT_TEXT, census_here
from tests.support.mmedit_files import write_records
from tests.support.words import LetterJob, LetterSettings

SAMPLES, SHARD = 24, 12
WISH: dict[str, Any] = {
    "suppress": "broccoli",
    "method": "zero",
    "neurons": 2,
    "samples": 2,
    "kept": 0,
    "keep_text": KEPT_TEXT,
}
AnyJob: TypeAlias = Job[Any, Any]


@dataclass(frozen=True)
class Place:
    """A folder of one test, and in it copies of what jobs write into."""

    root: Path

    @property
    def run(self) -> str:
        """A run of the demo model."""
        return str(self.root / "run")

    @property
    def census(self) -> str:
        """A run that has not begun, of which it is known what neurons write."""
        return str(self.root / "census")

    @property
    def edit(self) -> str:
        """An edit made from it."""
        return str(self.root / "edit")

    @property
    def aligned(self) -> str:
        """A network that nobody trained."""
        return str(self.root / "aligned")

    @property
    def data(self) -> str:
        """The run's data."""
        return str(self.root / "data.parquet")

    def copy(self, root: Path) -> Place:
        """Return a place with the same contents; files are shared, for a store replaces them and changes none."""
        shutil.copytree(self.root, root, copy_function=os.link)
        return Place(root)


def prepare(root: Path, tiny: Path) -> Place:
    """Make a place: a run whose data is named by a relative path, an edit of it, an untrained network."""
    from mmray.api import edit

    place = Place(root)
    rows = [row for row in pq.read_table(DATA).slice(0, 3 * SAMPLES).to_pylist() if row["language"] == "en"][:SAMPLES]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), place.data)
    (root / "text.txt").write_text("\n".join(f"{'abc'[n % 3]}{n}" for n in range(25)))
    before = Path.cwd()
    os.chdir(root)
    try:
        assert census_here("demo", "data.parquet", "run", shard_size=SHARD).complete
    finally:
        os.chdir(before)
    run(DecodingJob(_census(place)))
    edit(place.run, **WISH).save(place.edit)
    write_records(root / "records", 2)
    table = run(contrast(place, limit=None, shard_size=SHARD)).parts.table("mentions")
    # No test begins with it done.
    shutil.rmtree(f"{place.run}/{ContrastJob.name}")
    # By turns, because the demo makes up too little to fit a probe to.
    turns = [number % 2 == 0 for number in range(len(table))]
    at = table.schema.get_field_index("hallucinated")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(turns)), root / "mentions.parquet")
    settings = _alignment(place, str(tiny))
    pair = open_pair(settings)
    digests = {name: digest(resolve(getattr(settings, name))) for name in ("tower", "model")}
    torch.manual_seed(1)  # by some random weights the model writes the image's own token at every sample
    network = pair.network(settings.network, settings.hidden)
    training = {"step": 1, "seen": 4, "lost": 0, "loss": 0.5}
    save_alignment(open_store(settings.out), network, {"digests": digests, "training": training})
    (root / "tiny").write_text(str(tiny))
    return place


@dataclass(frozen=True)
class Case:
    """One job of the suite."""

    name: str
    make: Callable[..., AnyJob]
    """Makes the job at a place; settings may be given besides."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """Settings that make other results."""
    refused: bool = False
    """Whether its folder takes no other settings; else both results are kept."""
    later: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the merge alone reads."""
    files: tuple[str, ...] = ()
    """Files of its target that it writes besides tables."""
    saves: bool = False
    """Whether its worker itself writes what it is for, so that remembered results are not enough."""
    single: bool = False
    """Whether it has one unit."""
    merges: bool = True
    """Whether its merge reads its parts; else who runs it does."""
    slow: bool = False

    def run(self, place: Place, executor: Executor | None = None, **settings: Any) -> JobResult:
        """Run the job, in this process unless an executor is given."""
        return run(self.make(place, **settings), executor=executor)

    def fingerprint(self, place: Place, **settings: Any) -> str:
        """Return the fingerprint of the job at a place."""
        job = self.make(place, **settings)
        plan = job.plan()
        found: str = (plan.settings or job.settings).fingerprint(plan.digests)
        return found

    def parts_folder(self, place: Place) -> Path:
        """Return where the job's units are committed."""
        return Path(self.make(place).folder(self.fingerprint(place)))

    def left(self, place: Place, result: JobResult) -> dict[str, Any]:
        """Return what a run left behind, by name: tables, parts, files, and what it said; the place's path aside."""
        job = self.make(place)
        store = RunFolder.at(job.target).store
        committed = {name for receipt in result.parts.receipts.values() for name in receipt.parts or {}}
        found: dict[str, Any] = {f"part {name}": result.parts.table(name) for name in job.parts if name in committed}
        snapshot = newest(store, job.name)
        if snapshot is not None:
            found |= {name: snapshot.read(store, name) for name in snapshot.tables}
            found |= {
                f"tables/{name}": pq.read_table(Path(job.target, f"tables/{name}.parquet")) for name in snapshot.tables
            }
        found |= {key: store.read(key) for key in self.files}
        found["headline"] = json.dumps(result.headline, sort_keys=True, default=str).replace(str(place.root), "")
        return found


def letters(place: Place, **more: Any) -> AnyJob:
    known = {"run": str(place.root / "letters"), "text": str(place.root / "text.txt"), "local": True}
    return LetterJob(checked(LetterSettings, known | more))


def census(place: Place, **more: Any) -> AnyJob:
    return CensusJob(_census(place, **more))


def decoding(place: Place, **more: Any) -> AnyJob:
    return DecodingJob(_census(place, **({"out": str(place.root / "decoded")} | more)))


def _census(place: Place, **more: Any) -> CensusSettings:
    known = {"model": "demo", "data": place.data, "out": place.census, "shard_size": 8, "local": True}
    return census_settings(known | more)


def properties(place: Place, **more: Any) -> AnyJob:
    sizes = {"concepts": 2, "min_occurrences": 2, "images": 2, "maps": 1, "longest": 4, "draws": 10, "language": "en"}
    return PropertiesJob(property_settings({"run": place.run, "local": True, **sizes, **more}))


def saliency(place: Place, **more: Any) -> AnyJob:
    sizes = {"images": 8, "maps": 1, "draws": 10, "methods": "detector"}
    return SaliencyJob(saliency_settings({"run": place.run, "local": True, **sizes, **more}))


def hallucination(place: Place, **more: Any) -> AnyJob:
    sizes = {"limit": 4, "shard_size": 2, "draws": 10}
    return HallucinationJob(hallucination_settings({"run": place.run, "local": True, **sizes, **more}))


def contrast(place: Place, **more: Any) -> AnyJob:
    settings = _neurons(place, **{"limit": 4, "shard_size": 2, **more}).claims()
    return ContrastJob(settings, open_claims(settings))


def candidates(place: Place, **more: Any) -> AnyJob:
    settings = _neurons(place, **more)
    mentions = pq.read_table(place.root / "mentions.parquet")
    widths = tuple(open_run(place.run).info["model"]["widths"])
    moments = Moments(9, torch.zeros(sum(widths)).numpy(), torch.ones(sum(widths)).numpy())
    neurons = [(layer, 8 * layer) for layer in range(len(widths))]
    context = CandidateContext.above(
        open_claims(settings.claims()),
        candidates=tuple(neurons),
        controls=tuple((layer, unit + 1) for layer, unit in neurons),
        mentions=mentions,
        sums={(kind, name): moments for kind in (True, False) for name in QUANTITIES},
        widths=widths,
        names=PLAIN,
    )
    return CandidateJob(settings.probe(), context)


def doses(place: Place, **more: Any) -> AnyJob:
    settings = _neurons(place, **{"limit": 4, "shard_size": 2, **more})
    context = open_claims(settings.claims())
    every = (Condition("none", None, None, ()), Condition("raised", "scale", 3.0, ("L0.u3", "L2.u5")))
    names = pq.read_table(place.root / "mentions.parquet")["sample_id"].to_pylist()
    return DoseJob(settings.dose(), DoseContext.above(context, conditions=every, images=frozenset(names)))


def _neurons(place: Place, **more: Any) -> Any:
    return neuron_settings({"run": place.run, "local": True, "shard_size": 12, "draws": 10, **more})


def perturb(place: Place, **more: Any) -> AnyJob:
    known = {"model": "demo", "data": place.data, "out": str(place.root / "moved"), "local": True}
    sizes = {"limit": 2, "shard_size": 1, "steps": 2, "draws": 10}
    return PerturbJob(perturbation_settings({**known, **sizes, **more}))


def bias(place: Place, **more: Any) -> AnyJob:
    pairs = {"pair": ["ring:dog", "avocado:ring"], "unrelated": ["sun", "ship"]}
    asked = {**pairs, "question": ["Is there a dog in the image?"]}
    sizes = {"limit": 4, "shard_size": 2, "steps": 2, "draws": 10, "parse": "yes_no"}
    return BiasJob(bias_settings({"run": place.run, "local": True, **asked, **sizes, **more}))


def sums(place: Place, **more: Any) -> AnyJob:
    return SumsJob(_labelled(place, **more))


def interventions(place: Place, **more: Any) -> AnyJob:
    labelled = _labelled(place, **more)
    masks = tuple(
        Mask(label, "selected", (("language", 0, number), ("language", 1, number)))
        for number, label in enumerate(labelled.labels)
    )
    return TestsJob(labelled, Tests(masks, None))


def _labelled(place: Place, **more: Any) -> Any:
    sizes = {"by": "domain", "permutations": 2, "bootstraps": 0, "interventions": True}
    settings = selectivity_settings({"run": place.run, "local": True, **sizes, **more})
    return plan_labels(settings, open_run(place.run), hold_out=True)


def select(place: Place, **more: Any) -> AnyJob:
    known = {"run": place.run, "concepts": ("broccoli",), "k": 2, "samples": 16, "local": True}
    return SelectionJob(selection_settings({**known, **more}))


def edit(place: Place, **more: Any) -> AnyJob:
    wish = {**WISH, **{name: more.pop(name) for name in list(more) if name in EditSettings.model_fields}}
    known = {"run": place.run, "name": "no-broccoli", "wish": wish, "local": True}
    return EditJob(checked(NamedEditSettings, {**known, **more}))


def evaluation(place: Place, **more: Any) -> AnyJob:
    known = {"run": place.run, "edit": place.edit, "data": place.data, "local": True}
    sizes = {"limit": 4, "shard_size": 2, "text_count": 0, "bleu": False, "draws": 10}
    return EvaluationJob(evaluation_settings({**known, **sizes, **more}), open_edit)


def mmedit(place: Place, **more: Any) -> AnyJob:
    known = {"run": place.run, "vqa": str(place.root / "records/vqa_eval.json"), "methods": "ft-v,ike", "local": True}
    return MmeditJob(mmedit_settings({**known, "draws": 10, **more}))


def validation(place: Place, **more: Any) -> AnyJob:
    settings = _alignment(place, (place.root / "tiny").read_text(), **more)
    return ValidationJob(settings, "a training", plan_validation(settings))


def _alignment(place: Place, tiny: str, **more: Any) -> Any:
    known = {"tower": tiny, "model": tiny, "data": place.data, "validate_on": place.data, "out": place.aligned}
    return alignment_settings({**known, "hidden": 16, "draws": 20, "validate_limit": 4, "local": True, **more})


CASES = [
    Case("letters", letters, {"upper": True}, later={"most": 1}),
    Case("census", census, {"score": "gate"}, refused=True),
    Case("decoding", decoding, {"fold_norm": True}, merges=False, single=True),
    Case("properties", properties, {"images": 3}, later={"draws": 11}, slow=True),
    Case("saliency", saliency, {"images": 9}, later={"draws": 11}),
    Case("hallucination", hallucination, {"seed": 1}, later={"draws": 11}),
    Case("hallucination_contrast", contrast, {"longest": 6}, merges=False),
    Case("hallucination_neurons", candidates, {"seed": 1}, later={"draws": 11}),
    Case("hallucination_doses", doses, {"questions": 2}, later={"draws": 11}),
    Case("perturb", perturb, {"seed": 1}, refused=True, later={"draws": 11}),
    Case("bias", bias, {"seed": 1}, later={"draws": 11}),
    Case("sums", sums, {"count": "all"}, merges=False),
    Case("interventions", interventions, {"count": "all"}, merges=False),
    Case("select", select, {"samples": 12}),
    Case(
        "edit", edit, {"neurons": 3}, refused=True, files=("edit.safetensors",), saves=True, merges=False, single=True
    ),
    Case("evaluation", evaluation, {"seed": 1}, files=("captions.parquet",)),
    Case("mmedit", mmedit, {"methods": "ike"}, later={"draws": 11}),
    Case("validation", validation, {"pope_objects": 2}),
]
"""All jobs, the toy first."""
