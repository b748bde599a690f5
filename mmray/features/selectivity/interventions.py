"""What zeroing neurons does to texts that the selection did not see: what they cost, and which answers stay right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TypeAlias

import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from mmray.data.samples import Sample
from mmray.features.census.settings import CensusSettings
from mmray.features.selectivity.masks import Mask
from mmray.features.selectivity.material import Said, answers_of, by_text, captions_of, in_batches, read, token_places
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.tables import PARTS
from mmray.models.interventions import ablate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch

Reading: TypeAlias = tuple[Mask | None, Said, Float[Tensor, "token 2"]]
"""A text under a mask: of each token the nats that it costs, and 1 where it is the likeliest."""


def measured(
    model: LoadedModel,
    samples: Sequence[Sample],
    masks: Sequence[Mask],
    settings: SelectivitySettings,
    census: CensusSettings,
) -> pa.Table:
    """Return the rows of `measurements` of these samples: without a mask, and under each.

    nll: nats of all tokens of the caption, and how many. accuracy: questions whose answer is what greedy generation
    begins with, and how many; that is so where each token of it is the likeliest behind those before.
    """

    def readings(texts: Sequence[Said], batch: Batch) -> list[Reading]:
        return list(_readings(model, texts, batch, masks, settings.module))

    size, by = settings.batch_size, settings.by
    captions = in_batches(model, captions_of(model, samples, by, census), size, readings)
    rows = [
        _row(mask, said.label, said.sample_id, "nll", float(tokens[:, 0].double().sum()), len(tokens))
        for found in captions
        for mask, said, tokens in found
    ]
    right: dict[tuple[Mask | None, str, str], list[bool]] = defaultdict(list)
    for found in in_batches(model, answers_of(model, samples, by, settings.questions), size, readings):
        for mask, said, tokens in found:
            right[mask, said.label, said.sample_id].append(bool(tokens[:, 1].all()))
    rows += [_row(*key, "accuracy", float(sum(answers)), len(answers)) for key, answers in right.items()]
    return pa.Table.from_pylist(rows, schema=PARTS["measurements"])


def _readings(
    model: LoadedModel, texts: Sequence[Said], batch: Batch, masks: Sequence[Mask], module: str
) -> Iterator[Reading]:
    places = token_places(batch, texts)
    for mask in (None, *masks):
        with ablate(model, mask.neurons, module=module) if mask else nullcontext():
            found = read(model, batch, places)
        for said, part in zip(texts, by_text(places), strict=True):
            yield mask, said, found[part]


def _row(mask: Mask | None, label: str, sample_id: str, measure: str, total: float, count: int) -> dict[str, object]:
    return {
        "masked": mask and mask.label,
        "control": mask and mask.control,
        "label": label,
        "sample_id": sample_id,
        "measure": measure,
        "total": total,
        "count": float(count),
    }
