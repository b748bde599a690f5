"""Which neurons an edit may change: those that a run's rankings name for a concept, and the controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from mmray.errors import InputError
from mmray.features.editing.deltas import Neuron
from mmray.models.loading import LoadedModel
from mmray.neurons.controls import layer_matched
from mmray.runs.run import Run


def located(run: Run, concept: str, count: int, layers: Sequence[int], by: str = "specific") -> list[Neuron]:
    """Return the concept's neurons in these layers, the first `count` by score, specific or share.

    Raises InputError for a concept that the run does not know.
    """
    rows = run.rank(concept, len(run.table("rankings")), by)
    rows = rows.filter(pc.is_in(rows["layer"], pc.cast(list(layers), "int16"))).slice(0, count)
    if not len(rows):
        raise InputError(f"no ranked neuron of {concept!r} in layers {min(layers)} to {max(layers)}; edit more layers")
    return list(zip(rows["layer"].to_pylist(), rows["unit"].to_pylist(), strict=True))


def matched(model: LoadedModel, neurons: Sequence[Neuron], seed: int) -> list[Neuron]:
    """Return as many random neurons of the same layers, none of these among them: the control.

    Raises InputError where a layer has not as many others.
    """
    drawn = layer_matched(model.widths, neurons, str(seed))
    if len(drawn) < len(neurons):
        raise InputError(
            f"--method random: {len(neurons)} neurons are located and a layer has too few others; lower --neurons, or "
            "edit more --layers"
        )
    return drawn


def last_layers(model: LoadedModel, count: int) -> list[int]:
    """Return the last `count` layers, lowest first."""
    layers = len(model.widths)
    return list(range(max(0, layers - count), layers))


def sharing(run: Run, neurons: Sequence[Neuron]) -> list[str]:
    """Return the ids of samples at whose nouns these neurons are among the highest, those that use most first.

    What an edit of the neurons could harm: samples of other concepts that the same neurons write.
    """
    occurrences = run.table("occurrences").select(["sample_id", "neurons"]).combine_chunks()
    lists = occurrences["neurons"].combine_chunks()
    entries, parents = pc.list_flatten(lists), pc.list_parent_indices(lists)
    code = entries.field("layer").to_numpy().astype(np.int64) << 32 | entries.field("unit").to_numpy()
    used = np.isin(code, [layer << 32 | unit for layer, unit in neurons])
    weight = np.bincount(
        parents.to_numpy()[used], np.maximum(entries.field("score").to_numpy()[used], 0), minlength=len(occurrences)
    )
    names = occurrences["sample_id"].to_numpy(zero_copy_only=False)
    found: dict[str, float] = {}
    for place in np.argsort(-weight, kind="stable")[: int((weight > 0).sum())]:
        found.setdefault(names[place], float(weight[place]))
    return list(found)
