"""Heat maps of a concept's neurons over its images, and how well they point at its object."""

from __future__ import annotations

from collections.abc import Sequence

from mmray.datasets.images import decode_image
from mmray.datasets.samples import Sample
from mmray.evaluation.properties.observations import Key, Observations
from mmray.evaluation.properties.settings import DECODED, RANKINGS
from mmray.evaluation.properties.subject import Facts, Ranked, Study
from mmray.models.patches import patches_of
from mmray.neurons import controls
from mmray.neurons.heatmaps import Map, Wanted, patch_maps, pointing

SEVERAL = 2
"""Objects that an image needs for pointing to be a test: of a single one there is little beside it."""


def draw_maps(study: Study, facts: Facts, samples: Sequence[Sample], found: Observations) -> None:
    """Draw the mean activation of the ten highest neurons of both rankings over these images, and hold it to boxes."""
    encoded = study.encoded(samples)
    if encoded is None:
        return
    items, batch = encoded
    kinds = _kinds(study, facts)
    asked: list[Wanted] = []
    shown: list[tuple[Sample, str]] = []
    for row, item in enumerate(items):
        size = decode_image(item.sample.image or b"").size
        patches = patches_of(study.model, batch, row, size)
        if patches is None:
            continue
        for method, ranked in kinds.items():
            asked.append(Wanted(row, patches, ranked.neurons[:DECODED], ranked.signs[:DECODED] or None))
            shown.append((item.sample, method))
    for (sample, method), ask, values in zip(shown, asked, patch_maps(study.model, batch, asked), strict=True):
        _keep(study, facts, sample, method, ask, values, found)


def _kinds(study: Study, facts: Facts) -> dict[str, Ranked]:
    """Return whose maps are drawn: both rankings', and for comparison the first one without signs and a control."""
    score = facts.ranked["score"]
    matched = controls.layer_matched(study.model.widths, score.neurons[:DECODED], facts.concept)
    return {name: facts.ranked[name] for name in RANKINGS} | {
        "published": Ranked(score.neurons, ()),
        "layer-matched": Ranked(tuple(matched), ()),
    }


def _keep(
    study: Study, facts: Facts, sample: Sample, method: str, ask: Wanted, values: Map, found: Observations
) -> None:
    box = box_of(study, facts, sample)
    held = pointing(values, box, ask.patches.covers) if box is not None else None
    if held is not None and len(sample.objects or ()) >= SEVERAL:
        rows = {("pointing_game", method): held.hit, ("iou", method): held.iou}
        if method == "score":
            rows["pointing_game", "chance"] = held.area
        for (measure, kind), value in rows.items():
            found.add(Key("localisation", measure, kind, DECODED), facts.concept, sample.sample_id, value)
    if method in RANKINGS:
        found.heatmaps.append(
            {
                "concept": facts.concept,
                "sample_id": sample.sample_id,
                "method": method,
                "neurons": DECODED,
                "rows": ask.patches.rows,
                "columns": ask.patches.columns,
                "values": values.flatten().tolist(),
                "covers": list(ask.patches.covers),
                "box": list(box) if box is not None else None,
                "hit": held.hit if held is not None else None,
                "iou": held.iou if held is not None else None,
            }
        )


def box_of(study: Study, facts: Facts, sample: Sample) -> tuple[float, ...] | None:
    """Return the box of the concept's object, whose name may be in another language; None where there is none."""
    _, boxes = sample.boxes_of(facts.concept, study.nouns.translations)
    return boxes[0] if boxes else None
