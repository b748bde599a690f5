"""Heat maps of a concept's neurons over its images, and how well they point at the concept's object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import DECODED, RANKINGS
from mmray.features.properties.subject import ConceptInputs, Ranked, Study
from mmray.models.capture import has_gates
from mmray.models.patches import patches_of
from mmray.neurons import controls
from mmray.neurons.heatmaps import Map, MapRequest, patch_maps, pointing

UNSIGNED, GATE = "unsigned", "gate"
"""Maps of the same neurons for comparison: activations without signs, and gates, which the released code reads."""
SINGLE, SINGLES = "neuron", 3
"""Maps of single neurons: of so many highest by score, over a concept's first image."""
MIN_OBJECTS = 2
"""Objects that an image needs to test pointing: with a single object, there is hardly anything else to point at."""


def draw_maps(study: Study, unit: Sequence[ConceptInputs], samples: Mapping[str, Sample]) -> Observations:
    """Draw the mean activation of the ten highest neurons of both rankings over these concepts' images.

    Other maps are only compared with boxes: the same neurons without signs, their gates, and a control. The highest
    neurons have maps of their own, too. An image that several concepts share is run once.
    """
    concepts_of: dict[str, list[ConceptInputs]] = defaultdict(list)
    for inputs in unit:
        for name in inputs.maps:
            if name in samples:
                concepts_of[name].append(inputs)
    kinds = {inputs.concept: _map_neurons(study, inputs) for inputs in unit}
    drawn: dict[tuple[str, str], list[tuple[str, MapRequest, Map]]] = defaultdict(list)
    for items, batch in study.batches([samples[name] for name in concepts_of]):
        requests: list[tuple[tuple[str, str], str, MapRequest]] = []
        for row, item in enumerate(items):
            name = item.sample.sample_id
            size = decode_image(item.sample.image or b"", item.sample.background).size
            patches = patches_of(study.model, batch, row, size)
            if patches is None:
                continue  # this family's image tokens are not patches
            for inputs in concepts_of[name]:
                for method, ranked in kinds[inputs.concept].items():
                    of: Literal["gate", "activation"] = "gate" if method == GATE else "activation"
                    request = MapRequest(row, patches, ranked.neurons[:DECODED], ranked.signs[:DECODED] or None, of)
                    requests.append(((inputs.concept, name), method, request))
                if name == inputs.maps[0]:
                    highest = inputs.ranked["score"]
                    for neuron, sign in list(zip(highest.neurons, highest.signs, strict=True))[:SINGLES]:
                        requests.append(((inputs.concept, name), SINGLE, MapRequest(row, patches, [neuron], [sign])))
        maps = patch_maps(study.model, batch, [request for *_, request in requests])
        for (key, method, request), values in zip(requests, maps, strict=True):
            drawn[key].append((method, request, values))
    # Batches order images by caption length; the rows follow the order of the concepts instead.
    found = Observations()
    for inputs in unit:
        for name in inputs.maps:
            for method, request, values in drawn.get((inputs.concept, name), ()):
                _add_map(study, inputs, samples[name], method, request, values, found)
    return found


def _map_neurons(study: Study, inputs: ConceptInputs) -> dict[str, Ranked]:
    """Return the neurons of each kind of map: both rankings, and those that are only compared."""
    score = inputs.ranked["score"]
    matched = controls.layer_matched(study.model.widths, score.neurons[:DECODED], inputs.concept)
    return {name: inputs.ranked[name] for name in RANKINGS} | {
        UNSIGNED: Ranked(score.neurons, ()),
        "layer-matched": Ranked(tuple(matched), ()),
        **({GATE: Ranked(score.neurons, ())} if has_gates(study.model.network, study.model.projections) else {}),
    }


def _add_map(
    study: Study,
    inputs: ConceptInputs,
    sample: Sample,
    method: str,
    request: MapRequest,
    values: Map,
    found: Observations,
) -> None:
    box = box_of(study, inputs, sample)
    points = pointing(values, box, request.patches.covers) if box is not None else None
    if points is not None and method != SINGLE and len(sample.objects or ()) >= MIN_OBJECTS:
        rows = {("pointing_game", method): points.hit, ("iou", method): points.iou}
        if method == "score":
            # A random point falls into the box with the probability of the box's area.
            rows["pointing_game", "chance"] = points.area
        for (measure, kind), value in rows.items():
            found.add(Key("localisation", measure, kind, DECODED), inputs.concept, sample.sample_id, value)
    if method in (*RANKINGS, SINGLE):
        found.heatmaps.append(
            {
                "concept": inputs.concept,
                "sample_id": sample.sample_id,
                "method": method,
                "neurons": len(request.neurons),
                "rows": request.patches.rows,
                "columns": request.patches.columns,
                "values": values.flatten().tolist(),
                "covers": list(request.patches.covers),
                "box": list(box) if box is not None else None,
                "hit": points.hit if points is not None else None,
                "iou": points.iou if points is not None else None,
                "neuron": study.model.names.name(*request.neurons[0]) if method == SINGLE else None,
            }
        )


def box_of(study: Study, inputs: ConceptInputs, sample: Sample) -> tuple[float, ...] | None:
    """Return the box of the concept's object, whose name may be in another language; None if there is none."""
    _, boxes = sample.boxes_of(inputs.concept, study.nouns.translations)
    return boxes[0] if boxes else None
