"""Maps of a run's samples: draws those of a batch, and observes the words whose boxes are annotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from torch.nn import functional

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.detector.joint import JointModel
from mmray.engine.clock import phase
from mmray.errors import InputError
from mmray.features.census.settings import CensusSettings
from mmray.features.census.shard import Captioned, ShardAnalysis
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.measures import Boxes, objects_mask, points_at
from mmray.features.saliency.methods import METHODS, OF_BOXES, Explained, Located, method_of
from mmray.features.saliency.observations import draw_maps, observations
from mmray.features.saliency.saliency_input import open_input
from mmray.features.saliency.settings import SaliencySettings
from mmray.features.saliency.tables import PARTS
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.neurons.concepts import NounSource
from mmray.neurons.token_positions import TokenPosition, positions_of

MIN_OBJECTS = 2
"""Different objects an image needs: pointing at the only one would be no test."""
BATCH_SIZE = 8
KEPT_SIDE = 24
"""Points per side of the maps kept for the report."""

Rows = dict[str, list[dict[str, object]]]
"""Rows by the name of their part."""


def methods_of(settings: SaliencySettings, *, detector: bool) -> tuple[str, ...]:
    """Return the chosen methods, by default all possible ones. Raises InputError for unknown or impossible ones."""
    if settings.methods is None:
        return tuple(name for name in METHODS if detector or name not in OF_BOXES)
    chosen = tuple(name.strip() for name in settings.methods.split(",") if name.strip())
    if not chosen:
        raise InputError(f"--methods {settings.methods!r}: names none of {', '.join(METHODS)}")
    for name in chosen:
        method_of(name)
        if name in OF_BOXES and not detector:
            raise InputError(f"--methods {name}: it weighs a detector's boxes; give --detector")
    return chosen


@dataclass(frozen=True)
class MapObserver:
    """Draws and observes maps of a run's samples."""

    model: LoadedModel
    joint: JointModel | None
    settings: SaliencySettings
    census: CensusSettings
    nouns: NounSource
    located: Located

    def tables(self, samples: Sequence[Sample], pictured: frozenset[str]) -> dict[str, pa.Table]:
        """Return the parts of a unit; maps of the samples in `pictured` are kept."""
        analysis = ShardAnalysis(self.model, self.census.model_copy(update={"batch_size": BATCH_SIZE}), self.nouns, 0)
        rows: Rows = {name: [] for name in PARTS}
        suitable = [
            sample
            for sample in samples
            if sample.image and sample.boxes and len(set(sample.objects or ())) >= MIN_OBJECTS
        ]
        for items, batch in analysis.encoded(suitable):
            self._observe(items, batch, pictured, rows)
        rows["errors"] = [vars(failure) | {"shard_id": 0} for failure in analysis.failures]
        return {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in PARTS.items()}

    def _observe(self, items: list[Captioned], batch: Batch, pictured: frozenset[str], rows: Rows) -> None:
        targets, words, boxes = self._targets(items, batch)
        if not targets:
            return
        images = [decode_image(item.sample.image or b"", item.sample.background) for item in items]
        explained = Explained(open_input(self.model, self.joint, batch, targets, images), words, self.located)
        maps = draw_maps(explained, methods_of(self.settings, detector=self.joint is not None))
        with phase("judge"):
            rows["observations"].extend(observations(explained, maps, boxes, erased=self.settings.erasures))
        for index, target in enumerate(targets):
            if target.sample_id in pictured:
                covers = explained.input.grid(target.row).covers
                own = {method: found[index] for method, found in maps.items()}
                rows["saliency_maps"].extend(_map_rows(target, covers, boxes[index], own))

    def _targets(self, items: list[Captioned], batch: Batch) -> tuple[list[TokenPosition], list[str], list[Boxes]]:
        """Return the first mention of each object that has boxes, the detector's word for it, and the boxes."""
        found: dict[tuple[int, str], tuple[TokenPosition, str, Boxes]] = {}
        for position in positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items]):
            # The detector asks for the object's English name, whatever the language of the caption.
            name, boxes = items[position.row].sample.boxes_of(position.concept, self.nouns.translations)
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
        rows.append(
            {"concept": target.concept, "sample_id": target.sample_id, "method": method}
            | {"rows": KEPT_SIDE, "columns": KEPT_SIDE, "values": kept.flatten().tolist(), "covers": list(covers)}
            | {"boxes": [list(box) for box in boxes], "hit": points_at(saliency.values.cpu(), objects)}
        )
    return rows
