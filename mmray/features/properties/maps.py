"""Heat maps of a concept's neurons over its images, and how well they point at its object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import DECODED, RANKINGS
from mmray.features.properties.subject import Facts, Ranked, Study
from mmray.models.capture import has_gates
from mmray.models.patches import patches_of
from mmray.neurons import controls
from mmray.neurons.heatmaps import Map, MapRequest, patch_maps, pointing

UNSIGNED, GATE = "unsigned", "gate"
"""Maps of the same neurons for comparison: their activations without signs, and their gates, as the released code."""
SEVERAL = 2
"""Objects that an image needs for pointing to be a test: of a single one, hardly anything else is in it."""


def draw_maps(study: Study, unit: Sequence[Facts], samples: Mapping[str, Sample]) -> Observations:
    """Draw the mean activation of the ten highest neurons of both rankings over these concepts' images, with boxes.

    For comparison against boxes alone: those of the same neurons without signs, of their gates, and of a control.

    An image that several concepts share is run once.
    """
    askers: dict[str, list[Facts]] = defaultdict(list)
    for facts in unit:
        for name in facts.maps:
            if name in samples:
                askers[name].append(facts)
    kinds = {facts.concept: _kinds(study, facts) for facts in unit}
    drawn: dict[tuple[str, str], list[tuple[str, MapRequest, Map]]] = defaultdict(list)
    for items, batch in study.batches([samples[name] for name in askers]):
        asked: list[tuple[tuple[str, str], str, MapRequest]] = []
        for row, item in enumerate(items):
            name = item.sample.sample_id
            patches = patches_of(
                study.model, batch, row, decode_image(item.sample.image or b"", item.sample.background).size
            )
            if patches is None:
                continue
            for facts in askers[name]:
                for method, ranked in kinds[facts.concept].items():
                    of: Literal["gate", "activation"] = "gate" if method == GATE else "activation"
                    wanted = MapRequest(row, patches, ranked.neurons[:DECODED], ranked.signs[:DECODED] or None, of)
                    asked.append(((facts.concept, name), method, wanted))
        maps = patch_maps(study.model, batch, [wanted for *_, wanted in asked])
        for (key, method, wanted), values in zip(asked, maps, strict=True):
            drawn[key].append((method, wanted, values))
    found = Observations()
    for facts in unit:
        for name in facts.maps:
            for method, wanted, values in drawn.get((facts.concept, name), ()):
                _keep(study, facts, samples[name], method, wanted, values, found)
    return found


def _kinds(study: Study, facts: Facts) -> dict[str, Ranked]:
    """Return whose maps are drawn: both rankings', and for comparison the first one's without signs and a control."""
    score = facts.ranked["score"]
    matched = controls.layer_matched(study.model.widths, score.neurons[:DECODED], facts.concept)
    return {name: facts.ranked[name] for name in RANKINGS} | {
        UNSIGNED: Ranked(score.neurons, ()),
        "layer-matched": Ranked(tuple(matched), ()),
        **({GATE: Ranked(score.neurons, ())} if has_gates(study.model.network, study.model.projections) else {}),
    }


def _keep(
    study: Study, facts: Facts, sample: Sample, method: str, ask: MapRequest, values: Map, found: Observations
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
