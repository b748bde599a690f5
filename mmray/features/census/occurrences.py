"""The places of a scored batch → rows of `occurrences`, each with its highest neurons."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch

from mmray.features.census.tables import NEURON_ENTRY, PARTS
from mmray.models.generation import token_text
from mmray.models.loading import LoadedModel
from mmray.neurons.scoring import Scored
from mmray.neurons.token_positions import TokenPosition


def occurrence_table(model: LoadedModel, places: Sequence[TokenPosition], scored: Scored, top_k: int) -> pa.Table:
    """Return a row a place: its token, the token's log-probability, and its `top_k` highest neurons, highest first."""
    device = scored.scores[0].device
    scores = torch.cat([part.to(device) for part in scored.scores], dim=1)
    activation = torch.cat([part.to(device) for part in scored.activation], dim=1)
    best = scores.topk(min(top_k, scores.shape[1]), dim=1)
    index = best.indices.cpu()
    starts = torch.tensor([0, *model.widths]).cumsum(0)
    layer = torch.searchsorted(starts, index, right=True) - 1
    entries = pa.StructArray.from_arrays(
        [
            pa.array(layer.flatten().numpy()).cast(pa.int16()),
            pa.array((index - starts[layer]).flatten().numpy()).cast(pa.int32()),
            pa.array(best.values.cpu().flatten().numpy()),
            pa.array(activation.gather(1, best.indices).cpu().flatten().numpy()),
        ],
        fields=list(NEURON_ENTRY),
    )
    offsets = pa.array(range(0, len(entries) + 1, index.shape[1]), pa.int32())
    return pa.Table.from_arrays(
        [
            pa.array([place.sample_id for place in places], pa.string()),
            pa.array([place.concept for place in places], pa.string()),
            pa.array([token_text(model, place.token) for place in places], pa.string()),
            pa.array([place.token for place in places], pa.int32()),
            pa.array([place.position for place in places], pa.int32()),
            pa.array(scored.log_prob.float().cpu().numpy()),
            pa.ListArray.from_arrays(offsets, entries),
        ],
        schema=PARTS["occurrences"],
    )
