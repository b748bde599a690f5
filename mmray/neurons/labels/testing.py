"""What zeroing neurons does to texts that the selection did not see: what they cost, and which answers stay right."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pyarrow as pa

from mmray.datasets.samples import Sample
from mmray.label_tables import PASS_SCHEMAS
from mmray.models.interventions import ablate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.neurons.labels.masks import Mask
from mmray.neurons.labels.material import Said, answers_of, batches, by_text, captions_of, read, token_places
from mmray.neurons.labels.settings import SelectivitySettings

Encoded = list[tuple[list[Said], Batch]]


def measured(
    model: LoadedModel,
    samples: Sequence[Sample],
    masks: Sequence[Mask],
    settings: SelectivitySettings,
    prompt: str | None,
) -> pa.Table:
    """Return the rows of `measurements` of these samples: without a mask, and under each.

    nll: nats of all tokens of the caption, and how many. accuracy: questions whose answer is what greedy generation
    begins with, and how many; that is so where each token of it is the likeliest behind those before.
    """
    size, by = settings.batch_size, settings.by
    captions = list(batches(model, captions_of(model, samples, by, prompt), size))
    answers = list(batches(model, answers_of(model, samples, by, settings.questions), size))
    rows = []
    for mask in (None, *masks):
        known = {"masked": mask and mask.label, "control": mask and mask.control}
        with ablate(model, mask.neurons, module=settings.module) if mask else nullcontext():
            rows += [known | row for row in _costs(model, captions)]
            rows += [known | row for row in _answers(model, answers)]
    return pa.Table.from_pylist(rows, schema=PASS_SCHEMAS["measurements"])


def _costs(model: LoadedModel, encoded: Encoded) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for texts, batch in encoded:
        places = token_places(batch, texts)
        costs = read(model, batch, places)[:, 0].double()
        for said, part in zip(texts, by_text(places), strict=True):
            total, count = float(costs[part].sum()), part.stop - part.start
            rows.append(_row(said, "nll", total, count))
    return rows


def _answers(model: LoadedModel, encoded: Encoded) -> list[dict[str, object]]:
    right: dict[tuple[str, str], list[bool]] = {}
    for texts, batch in encoded:
        places = token_places(batch, texts)
        likeliest = read(model, batch, places)[:, 1]
        for said, part in zip(texts, by_text(places), strict=True):
            right.setdefault((said.sample_id, said.label), []).append(bool(likeliest[part].all()))
    return [
        {
            "label": label,
            "sample_id": name,
            "measure": "accuracy",
            "total": float(sum(found)),
            "count": float(len(found)),
        }
        for (name, label), found in right.items()
    ]


def _row(said: Said, measure: str, total: float, count: int) -> dict[str, object]:
    return {
        "label": said.label,
        "sample_id": said.sample_id,
        "measure": measure,
        "total": total,
        "count": float(count),
    }
