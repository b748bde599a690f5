"""Saliency as a job: units of a few images, whose words every method maps; merged into measures and some maps."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from torch.nn import functional

from mmray.data.image_keys import image_keys, one_per_image
from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.data.shards import Manifest
from mmray.detector.alignment import alignment_digest
from mmray.detector.joint import JointModel, detector_digest, detector_or_demo, join_if_given
from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.engine.clock import phase
from mmray.errors import InputError
from mmray.features.census.inputs import open_inputs
from mmray.features.census.run_samples import RunSamples
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import Captioned, ShardAnalysis
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.measures import Boxes, objects_mask, points_at
from mmray.features.saliency.methods import Explained, Located, chosen_methods
from mmray.features.saliency.observations import draw_maps, observations
from mmray.features.saliency.saliency_input import open_input
from mmray.features.saliency.settings import SaliencySettings
from mmray.features.saliency.summary import summarise_saliency
from mmray.features.saliency.tables import PARTS
from mmray.models.loading import LoadedModel, require_images
from mmray.models.prompting import Batch
from mmray.neurons.model import load_model
from mmray.neurons.token_positions import TokenPosition, positions_of
from mmray.runs.run import Run, open_run

UNIT_IMAGES = 16
"""Images per unit of work."""
BATCH_SIZE = 8
KEPT_SIDE = 24
"""Points per side of the maps kept for the report."""

Rows = dict[str, list[dict[str, object]]]
"""Rows by the name of their part."""


@dataclass(frozen=True)
class SaliencyContext(RunSamples):
    """All that workers need besides model and data."""

    pictured: frozenset[str]
    """Samples whose maps are kept for the report."""
    located: Located


class SaliencyJob(Job[SaliencySettings, SaliencyContext]):
    """Measures how well each method's maps of a run's words point at their objects."""

    name = "saliency"
    unit_noun = "images"
    parts: ClassVar[dict[str, pa.Schema]] = {name: PARTS[name] for name in ("observations", "saliency_maps")}

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[SaliencyContext]:
        """Draw the images."""
        return plan_saliency(self.settings, open_run(self.settings.run))

    def worker(self, context: SaliencyContext) -> Worker:
        """Load the model with its detector, and return the function that maps the words of a unit's images."""
        census, settings = context.census, self.settings
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        joint = join_if_given(model, settings.detector, settings.alignment)
        methods = chosen_methods(settings.methods, detector=joint is not None)
        cache = context.open_cache()
        observer = MapObserver(model, joint, methods, settings.erasures, settings.min_objects, context)

        def observe(unit: Unit) -> UnitResult:
            found = cache.samples(unit.payload)
            samples = [found[name] for name in unit.payload if name in found]
            return UnitResult(observer.tables(samples))

        return observe

    def merge(self, plan: Plan[SaliencyContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write measures of every method and maps of some images. Raises InputError where no image could be used."""
        observed, context, settings = parts.table("observations"), plan.context, self.settings
        if not len(observed) and len(parts.receipts) == len(plan.units):
            raise InputError(
                f"{settings.run}: none of {len(context.captions):,} images drawn has "
                f"{_objects(settings.min_objects)} with boxes; see --boxes-column of a census, --min-objects, --images"
            )
        if len(observed):
            measures = summarise_saliency(observed, settings.draws, settings.seed, context.images, settings.min_objects)
            output.table("saliency", measures)
            output.table("saliency_maps", parts.table("saliency_maps"))
        words = {(row["sample_id"], row["concept"]) for row in observed.select(["sample_id", "concept"]).to_pylist()}
        return {"images": len({sample for sample, _ in words}), "words": len(words)}


def plan_saliency(settings: SaliencySettings, run: Run) -> Plan[SaliencyContext]:
    """Return the plan: images drawn among those with a caption of several nouns; a unit's payload is sample names."""
    # Words are explained where the run's own captions have them, so no caption is generated again.
    census = census_settings(run.info["settings"] | {"captions": "dataset"})
    require_images(census.model, "mmray saliency", trust_remote_code=census.trust_remote_code)
    rows = {row["sample_id"]: row for row in run.table("captions").to_pylist()}
    nouns: dict[str, set[str]] = defaultdict(set)
    for row in run.table("occurrences").select(["concept", "sample_id"]).to_pylist():
        nouns[row["sample_id"]].add(row["concept"])
    keys = image_keys(run.table("captions"))
    # One sample per image, the first by name: captions of one image would be explained on the same pixels.
    # As many nouns as objects are needed, because the image then probably has them.
    several = [sample for sample, found in nouns.items() if len(found) >= settings.min_objects]
    several = one_per_image(sorted(several), keys)
    chosen = random.Random(settings.seed).sample(several, min(settings.images, len(several)))
    if not chosen:
        raise InputError(f"{run.uri}: no caption names {_objects(settings.min_objects)}; see --min-objects")
    # By shard, so that a unit reads few of them.
    by_shard = sorted(chosen, key=lambda name: (rows[name]["shard_id"], name))
    _, _, source = open_inputs(census_settings(run.info["settings"]))
    groups = tuple(tuple(by_shard[start : start + UNIT_IMAGES]) for start in range(0, len(by_shard), UNIT_IMAGES))
    # The detector's default depends on the model, so it is the resolved one that enters the digests.
    detector = detector_or_demo(settings.detector, census.model)
    digests = run.digests() | {
        "units": hashlib.sha256(repr(groups).encode()).hexdigest()[:16],
        "detector": detector_digest(detector) if detector else "",
        "alignment": alignment_digest(settings.alignment) if settings.alignment else "",
    }
    context = SaliencyContext(
        census=census,
        manifest=Manifest.from_json(run.folder.manifest()),
        nouns=source,
        shards={name: rows[name]["shard_id"] for name in chosen},
        captions={name: rows[name]["caption"] for name in chosen},
        images={name: keys[name] for name in chosen},
        # The first ones are a random choice too: `chosen` is in the order of the draw.
        pictured=frozenset(chosen[: settings.maps]),
        located=_located(run),
    )
    return Plan([Unit(len(group), group) for group in groups], digests, context)


def _objects(count: int) -> str:
    return f"{count} different objects" if count > 1 else "an object"


def _located(run: Run) -> Mapping[str, tuple[list[tuple[int, int]], list[float]]]:
    """Return concept → the ten neurons that the run ranks highest by `specific`, and the signs of their activations."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    columns = "concept, layer, unit, activation"
    ranked = run.sql(f"select {columns} from rankings where specific_rank <= 10 order by concept, specific_rank")
    for row in ranked.to_pylist():
        found[row["concept"]].append(row)
    return {
        name: (
            [(row["layer"], row["unit"]) for row in rows],
            # A neuron whose activation is negative supports the word where it is most negative, hence its sign.
            [1.0 if row["activation"] >= 0 else -1.0 for row in rows],
        )
        for name, rows in found.items()
    }


@dataclass(frozen=True)
class MapObserver:
    """Draws and observes maps of a run's samples."""

    model: LoadedModel
    joint: JointModel | None
    methods: tuple[str, ...]
    erased: bool
    """Observe insertion and deletion too."""
    min_objects: int
    """Different objects an image needs."""
    context: SaliencyContext

    def tables(self, samples: Sequence[Sample]) -> dict[str, pa.Table]:
        """Return the parts of a unit with these samples."""
        census = self.context.census.model_copy(update={"batch_size": BATCH_SIZE})
        analysis = ShardAnalysis(self.model, census, self.context.nouns, 0)
        rows: Rows = {name: [] for name in PARTS}
        suitable = [
            sample
            for sample in samples
            if sample.image and sample.boxes and len(set(sample.objects or ())) >= self.min_objects
        ]
        for items, batch in analysis.encoded(suitable):
            self._observe(items, batch, rows)
        # Units are no shards here, but the schema of errors has the column.
        rows["errors"] = [vars(failure) | {"shard_id": 0} for failure in analysis.failures]
        return {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in PARTS.items()}

    def _observe(self, items: list[Captioned], batch: Batch, rows: Rows) -> None:
        targets, words, boxes = self._targets(items, batch)
        if not targets:
            return
        # Decoded again: the batch only holds what the model's processor made of them.
        images = [decode_image(item.sample.image or b"", item.sample.background) for item in items]
        explained = Explained(open_input(self.model, self.joint, batch, targets, images), words, self.context.located)
        maps = draw_maps(explained, self.methods)
        with phase("judge"):
            rows["observations"].extend(observations(explained, maps, boxes, erased=self.erased))
        for index, target in enumerate(targets):
            if target.sample_id in self.context.pictured:
                covers = explained.input.grid(target.row).covers
                own = {method: found[index] for method, found in maps.items()}
                rows["saliency_maps"].extend(_map_rows(target, covers, boxes[index], own))

    def _targets(self, items: list[Captioned], batch: Batch) -> tuple[list[TokenPosition], list[str], list[Boxes]]:
        """Return the first mention of each object that has boxes, the detector's word for it, and the boxes."""
        found: dict[tuple[int, str], tuple[TokenPosition, str, Boxes]] = {}
        for position in positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items]):
            # The detector asks for the object's English name, whatever the language of the caption.
            name, boxes = items[position.row].sample.boxes_of(position.concept, self.context.nouns.translations)
            if boxes:
                found.setdefault((position.row, position.concept), (position, name, boxes))
        rows = list(found.values())
        return [position for position, _, _ in rows], [name for _, name, _ in rows], [boxes for _, _, boxes in rows]


def _map_rows(
    target: TokenPosition, covers: Sequence[float], boxes: Boxes, maps: dict[str, Saliency]
) -> list[dict[str, object]]:
    objects = objects_mask(boxes, covers)
    rows: list[dict[str, object]] = []
    for method, saliency in maps.items():
        kept = functional.adaptive_avg_pool2d(saliency.values[None].float(), KEPT_SIDE)
        # `hit` is judged on the whole map: averaging for the report may move its highest point.
        rows.append(
            {"concept": target.concept, "sample_id": target.sample_id, "method": method}
            | {"rows": KEPT_SIDE, "columns": KEPT_SIDE, "values": kept.flatten().tolist(), "covers": list(covers)}
            | {"boxes": [list(box) for box in boxes], "hit": points_at(saliency.values.cpu(), objects)}
        )
    return rows
