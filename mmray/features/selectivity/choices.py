"""Selections → the rows of a run's tables `selectivity` and `selective_labels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from mmray.features.selectivity.masks import named
from mmray.features.selectivity.selection import LabelSelection
from mmray.features.selectivity.tables import TABLES
from mmray.neuron_names import neuron_name


def neuron_rows(
    selection: LabelSelection, labels: Sequence[str], widths: Sequence[int], facts: Mapping[str, str]
) -> pa.Table:
    """Return a row a label's neuron; `facts` tell the analysis."""
    scores = dict(zip(selection.chosen.neurons.tolist(), selection.chosen.score.tolist(), strict=True))
    rows = []
    for number, label in enumerate(labels):
        own = selection.chosen.of(number).tolist()
        for rank, (neuron, (layer, unit)) in enumerate(zip(own, named(own, widths), strict=True), 1):
            rows.append(
                {
                    **facts,
                    "label": label,
                    "rank": rank,
                    "layer": layer,
                    "unit": unit,
                    "neuron": neuron_name(layer, unit),
                    "score": scores[neuron],
                    "amount": float(selection.amount[neuron, number]),
                    "magnitude_entropy": float(selection.magnitude_entropy[neuron]),
                    "p_value": None if selection.p_value is None else float(selection.p_value[neuron]),
                    "stability": None if selection.stability is None else float(selection.stability[neuron, number]),
                }
            )
    return pa.Table.from_pylist(rows, schema=TABLES["selectivity"])


def label_rows(
    selection: LabelSelection,
    labels: Sequence[str],
    samples: Mapping[str, int],
    widths: Sequence[int],
    facts: Mapping[str, str],
) -> pa.Table:
    """Return a row a label; `samples` are those that were selected from."""
    starts = np.cumsum([0, *widths])
    union = int(selection.chosen.member.any(dim=1).sum())
    rows = []
    for number, label in enumerate(labels):
        own = selection.chosen.of(number).numpy()
        rows.append(
            {
                **facts,
                "label": label,
                "samples": samples[label],
                "tokens": int(selection.tokens[number]),
                "neurons": len(own),
                "union": union,
                "cut": None if selection.cut[number].isnan() else float(selection.cut[number]),
                "chance": None if selection.chance is None else float(selection.chance[number]),
                "stability": None if selection.overlap is None else float(selection.overlap[number]),
                "layers": np.histogram(own, starts)[0].tolist(),
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["selective_labels"])
