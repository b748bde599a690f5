"""The rows of `occurrences` of a scored batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmray.features.census.tables import NEURON_ENTRY, PARTS
from mmray.features.census.top import top
from mmray.models.generation import token_text
from mmray.models.loading import LoadedModel
from mmray.neurons.scoring import Scored
from mmray.neurons.token_positions import TokenPosition

COPIED = 2**22
"""Scores copied at a time: 16 MB."""


def occurrence_table(model: LoadedModel, positions: Sequence[TokenPosition], scored: Scored, top_k: int) -> pa.Table:
    """Return one row per scored position: its token, log-probability and `top_k` highest neurons, highest first."""
    values, index = _highest(scored, min(top_k, sum(model.widths)))
    starts = torch.tensor([0, *model.widths]).cumsum(0)
    # The layer is the last one that starts at or before the index.
    layer = torch.searchsorted(starts, index, right=True) - 1
    unit, activation = index - starts[layer], torch.zeros(index.shape)
    # Layer by layer: with a copy of all activations, a batch would take the most memory here.
    for number, part in enumerate(scored.activation):
        at = layer == number
        activation[at] = part[at.nonzero()[:, 0].to(part.device), unit[at].to(part.device)].cpu()
    # Built from flat arrays, without a Python object per neuron.
    entries = pa.StructArray.from_arrays(
        [
            pa.array(layer.flatten().numpy()).cast(pa.int16()),
            pa.array(unit.flatten().numpy()).cast(pa.int32()),
            pa.array(values.flatten().numpy()),
            pa.array(activation.flatten().numpy()),
        ],
        fields=list(NEURON_ENTRY),
    )
    offsets = pa.array(range(0, len(entries) + 1, index.shape[1]), pa.int32())
    return pa.table(
        {
            "sample_id": [position.sample_id for position in positions],
            "concept": [position.concept for position in positions],
            "token": [token_text(model, position.token) for position in positions],
            "token_id": [position.token for position in positions],
            "position": [position.position for position in positions],
            "log_prob": scored.log_prob.float().cpu().numpy(),
            "neurons": pa.ListArray.from_arrays(offsets, entries),
        },
        schema=PARTS["occurrences"],
    )


def _highest(scored: Scored, count: int) -> tuple[Float[Tensor, "position highest"], Int64[Tensor, "position highest"]]:
    """Return each position's highest scores, and the neurons' places over all layers."""
    device = scored.scores[0].device  # the layers of a model over several GPUs lie on different ones
    values, index, start = [], [], 0
    for _, group in groupby(scored.scores, key=lambda part: part.device):
        layers = list(group)
        width = sum(part.shape[1] for part in layers)
        # Some positions at a time: with a copy of all scores, a batch would take the most memory here.
        found = [
            top(torch.cat(some, dim=1), min(count, width))
            for some in zip(*(torch.split(part, max(1, COPIED // width)) for part in layers), strict=True)
        ]
        highest, neurons = (torch.cat(column).to(device) for column in zip(*found, strict=True))
        values.append(highest)
        index.append(neurons + start)
        start += width
    best = torch.cat(values, dim=1).topk(count, dim=1)
    return best.values.cpu(), torch.cat(index, dim=1).gather(1, best.indices).cpu()
