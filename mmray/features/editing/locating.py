"""The neurons that an edit may change: those that a run's rankings name for a concept, and random controls."""

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
    """Return the first `count` neurons of the concept's ranking that are in these layers.

    Raises InputError if the run does not know the concept, or ranks none of its neurons there.
    """
    # All of the ranking, because the layers are chosen afterwards.
    rows = run.rank(concept, len(run.table("rankings")), by)
    rows = rows.filter(pc.is_in(rows["layer"], pc.cast(list(layers), "int16"))).slice(0, count)
    if not len(rows):
        raise InputError(f"no ranked neuron of {concept!r} in layers {min(layers)} to {max(layers)}; raise --layers")
    return list(zip(rows["layer"].to_pylist(), rows["unit"].to_pylist(), strict=True))


def probed(run: Run, count: int, layers: Sequence[int], *, raised: bool) -> list[Neuron]:
    """Return the first `count` neurons in these layers by their weight in the run's probe of hallucinated mentions.

    With `raised`, only those that do more at hallucinated mentions. Raises InputError without such neurons.
    """
    table = run.optional("hallucination_neurons")
    if table is None:
        raise InputError(f"{run.uri}: --by probe needs the neurons of `mmray hallucination {run.uri} --neurons`")
    rows = [row for row in table.to_pylist() if row["layer"] in layers and (row["weight"] > 0 or not raised)]
    if not rows:
        raise InputError(
            f"--by probe: the probe has no such neuron in layers {min(layers)} to {max(layers)}; raise --layers"
        )
    rows.sort(key=lambda row: -abs(row["weight"]))
    return [(row["layer"], row["unit"]) for row in rows[:count]]


def matched(model: LoadedModel, neurons: Sequence[Neuron], seed: int) -> list[Neuron]:
    """Return as many random neurons per layer, none of the given ones among them: the control.

    Raises InputError if a layer has too few others.
    """
    drawn = layer_matched(model.widths, neurons, str(seed))
    if len(drawn) < len(neurons):
        raise InputError(
            f"--method random: {len(neurons)} neurons are located and a layer has too few others; lower --neurons, or "
            "raise --layers"
        )
    return drawn


def last_layers(model: LoadedModel, count: int) -> list[int]:
    """Return the last `count` layers, lowest first."""
    layers = len(model.widths)
    return list(range(max(0, layers - count), layers))


def sharing(run: Run, neurons: Sequence[Neuron]) -> list[str]:
    """Return the samples with a noun that these neurons are among the highest for, by falling sum of their scores.

    These are the captions that an edit of the neurons is most likely to harm.
    """
    occurrences = run.table("occurrences").select(["sample_id", "neurons"]).combine_chunks()
    lists = occurrences["neurons"].combine_chunks()
    entries, parents = pc.list_flatten(lists), pc.list_parent_indices(lists)
    # Layer and unit as one integer, so that membership is one vectorised test.
    code = entries.field("layer").to_numpy().astype(np.int64) << 32 | entries.field("unit").to_numpy()
    used = np.isin(code, [layer << 32 | unit for layer, unit in neurons])
    # Clamped at 0: a neuron that lowers the noun must not cancel one that writes it.
    weight = np.bincount(
        parents.to_numpy()[used], np.maximum(entries.field("score").to_numpy()[used], 0), minlength=len(occurrences)
    )
    names = occurrences["sample_id"].to_numpy(zero_copy_only=False)
    # Stable, so that ties keep the table's order and the same captions are chosen each time.
    order = np.argsort(-weight, kind="stable")[: int((weight > 0).sum())]
    return list(dict.fromkeys(names[order].tolist()))
