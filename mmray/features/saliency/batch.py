"""Saliency maps of a run's samples: a batch of them, with the words that their boxes can judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
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
from mmray.features.saliency.questions import look_at
from mmray.features.saliency.settings import SaliencySettings
from mmray.features.saliency.tables import PARTS
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.neurons.concepts import NounSource
from mmray.neurons.token_positions import TokenPosition, places_of

SEVERAL = 2
"""Different objects that an image needs for pointing to be a test."""
TOGETHER = 8
"""Images of a batch."""
KEPT = 24
"""Points a side of the maps that are kept."""


def methods_of(settings: SaliencySettings, *, detector: bool) -> tuple[str, ...]:
    """Return the methods that are asked for, or all there can be. Raises InputError for one that there is not."""
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
class Judging:
    """What all batches of a run share."""

    model: LoadedModel
    joint: JointModel | None
    settings: SaliencySettings
    census: CensusSettings
    nouns: NounSource
    located: Located

    def tables(self, samples: Sequence[Sample], pictured: frozenset[str]) -> tuple[dict[str, pa.Table], int]:
        """Return what is observed of samples, and the number that failed; maps of those `pictured` are kept."""
        census = self.census.model_copy(update={"batch_size": TOGETHER})
        analysis = ShardAnalysis(self.model, census, self.nouns, 0)
        rows: dict[str, list[dict[str, object]]] = {name: [] for name in PARTS}
        judged = [sample for sample in samples if sample.image and len(set(sample.objects or ())) >= SEVERAL]
        for items, batch in analysis.encoded([sample for sample in judged if sample.boxes]):
            self._batch(items, batch, pictured, rows)
        rows["errors"] = [vars(failure) | {"shard_id": 0} for failure in analysis.failures]
        tables = {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in PARTS.items()}
        return tables, len(analysis.failures)

    def _batch(
        self, items: list[Captioned], batch: Batch, pictured: frozenset[str], rows: dict[str, list[dict[str, object]]]
    ) -> None:
        places, words, boxes = self._asked(items, batch)
        if not places:
            return
        images = [decode_image(item.sample.image or b"", item.sample.background) for item in items]
        looked = Explained(look_at(self.model, self.joint, batch, places, images), words, self.located)
        maps = draw_maps(looked, methods_of(self.settings, detector=self.joint is not None))
        with phase("judge"):
            rows["observations"].extend(observations(looked, maps, boxes, erased=self.settings.erasures))
        for number, place in enumerate(places):
            if place.sample_id in pictured:
                kept = {method: found[number] for method, found in maps.items()}
                rows["saliency_maps"].extend(_pictures(looked, place, boxes[number], kept))

    def _asked(self, items: list[Captioned], batch: Batch) -> tuple[list[TokenPosition], list[str], list[Boxes]]:
        """Return the first place of each object that has boxes, the detector's word for it, and the boxes."""
        found: dict[tuple[int, str], tuple[TokenPosition, str, Boxes]] = {}
        for place in places_of(batch, [(item.sample.sample_id, item.mentions) for item in items]):
            name, boxes = items[place.row].sample.boxes_of(place.concept, self.nouns.translations)
            if boxes:
                found.setdefault((place.row, place.concept), (place, name, boxes))
        asked = list(found.values())
        return [place for place, _, _ in asked], [name for _, name, _ in asked], [boxes for _, _, boxes in asked]


def _pictures(
    looked: Explained, place: TokenPosition, boxes: Boxes, maps: dict[str, Saliency]
) -> list[dict[str, object]]:
    covers = looked.look.grid(place.row).covers
    objects = objects_mask(boxes, covers)
    return [
        {"concept": place.concept, "sample_id": place.sample_id, "method": method, "rows": KEPT, "columns": KEPT}
        | {"values": _smaller(saliency).flatten().tolist(), "covers": list(covers), "boxes": [list(b) for b in boxes]}
        | {"hit": points_at(saliency.values.cpu(), objects)}
        for method, saliency in maps.items()
    ]


def _smaller(saliency: Saliency) -> torch.Tensor:
    return functional.adaptive_avg_pool2d(saliency.values[None, None].float(), KEPT)[0, 0].cpu()
