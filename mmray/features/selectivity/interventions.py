"""Effects of zeroing neurons on held-out samples: the likelihood of their texts, and the accuracy of their answers."""

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
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.tables import PARTS
from mmray.features.selectivity.texts import (
    LabelledText,
    answers_of,
    by_text,
    captions_of,
    in_batches,
    read,
    token_positions,
)
from mmray.models.interventions import ablate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch

Reading: TypeAlias = tuple[Mask | None, LabelledText, Float[Tensor, "token 2"]]
"""A text under a mask: per token its negative log-likelihood in nats, and 1 if it is the top token."""


def measure_interventions(
    model: LoadedModel,
    samples: Sequence[Sample],
    masks: Sequence[Mask],
    settings: SelectivitySettings,
    census: CensusSettings,
) -> pa.Table:
    """Return the rows of `measurements` for these samples, without a mask and under each one.

    nll: nats of all tokens of the caption, and their number. accuracy: questions that are answered correctly, and their
    number. An answer is correct if greedy generation starts with it.
    """

    def readings(texts: Sequence[LabelledText], batch: Batch) -> list[Reading]:
        return list(_readings(model, texts, batch, masks, settings.module))

    size, by = settings.batch_size, settings.by
    captions = in_batches(model, captions_of(model, samples, by, census), size, readings)
    rows = [
        _row(mask, text.label, text.sample_id, "nll", float(tokens[:, 0].double().sum()), len(tokens))
        for found in captions
        for mask, text, tokens in found
    ]
    right: dict[tuple[Mask | None, str, str], list[bool]] = defaultdict(list)
    for found in in_batches(model, answers_of(model, samples, by, settings.questions), size, readings):
        for mask, text, tokens in found:
            # Greedy generation starts with the answer if every token is the top one after those before it, which one
            # teacher-forced pass shows.
            right[mask, text.label, text.sample_id].append(bool(tokens[:, 1].all()))
    rows += [_row(*key, "accuracy", float(sum(answers)), len(answers)) for key, answers in right.items()]
    return pa.Table.from_pylist(rows, schema=PARTS["measurements"])


def _readings(
    model: LoadedModel, texts: Sequence[LabelledText], batch: Batch, masks: Sequence[Mask], module: str
) -> Iterator[Reading]:
    positions = token_positions(batch, texts)
    for mask in (None, *masks):
        with ablate(model, mask.neurons, module=module) if mask else nullcontext():
            found = read(model, batch, positions)
        for text, part in zip(texts, by_text(positions), strict=True):
            yield mask, text, found[part]


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
