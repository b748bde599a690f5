"""A run's results in files of other programs: tables as CSV, and neurons in the batches that Neuronpedia takes.

Neuronpedia reads what SAEDashboard writes: per layer, files `batch-N.json` of features. Here a feature is a neuron, and
its index the neuron's unit.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mmray.errors import InputError
from mmray.runs.examples import example_rows
from mmray.runs.run import Run

BATCH = 1024
"""Features per file of Neuronpedia."""
SOURCE = "mlp-neurons"
"""Name of the set of features: inputs of the MLPs' output projections."""
ROWS = 1 << 16
"""Rows of a table that are converted at a time."""
EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_values",
    "pos_values",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""Fields of a feature that a run's tables don't know."""


def export_csv(run: Run, out: Path) -> list[Path]:
    """Write every table of a run as `OUT/NAME.csv`, and return the files; lists are JSON. A table is read in parts."""
    _begin(run, out)
    return [_write_csv(run, name, out / f"{name}.csv") for name in run.tables]


def export_neuronpedia(run: Run, out: Path) -> list[Path]:
    """Write the neurons that concepts rank, by layer, as `OUT/LAYER-mlp-neurons/batch-N.json`, and return the files.

    An activation is an example's caption as one token, because tables don't have captions by token. Logits of tokens
    are not in the tables either, so these lists are empty.
    """
    _begin(run, out)
    files = []
    for layer, width in enumerate(run.info["model"]["widths"]):
        folder = out / f"{layer}-{SOURCE}"
        for number, start in enumerate(range(0, width, BATCH)):
            features = _features(run, layer, start)
            if features:
                folder.mkdir(exist_ok=True)
                files.append(folder / f"batch-{number}.json")
                content = {"model_id": run.info["model"].get("name", run.info["settings"]["model"])}
                content |= {"layer": layer, "sae_set": SOURCE, "sae_id_suffix": None, "features": features}
                files[-1].write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return files


def _begin(run: Run, out: Path) -> None:
    if "rankings" not in run.tables:
        raise InputError(f"{run.uri}: the census has not ended, so there is nothing to export; run it again")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: can't write here ({error.strerror}); choose another --out") from error


def _write_csv(run: Run, name: str, file: Path) -> Path:
    scan = run.scan(name)
    nested = {field.name for field in scan.schema if pa.types.is_nested(field.type)}
    schema = pa.schema([(field.name, pa.string() if field.name in nested else field.type) for field in scan.schema])
    with pyarrow.csv.CSVWriter(str(file), schema) as writer:
        # In parts, because a table may be larger than memory.
        for part in scan.to_batches(batch_size=ROWS):
            columns = [_as_json(part[field]) if field in nested else part[field] for field in schema.names]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return file


def _as_json(column: pa.Array) -> pa.Array:
    return pa.array(
        [None if value is None else json.dumps(value, ensure_ascii=False) for value in column.to_pylist()], pa.string()
    )


def _features(run: Run, layer: int, start: int) -> list[dict[str, Any]]:
    """Return the features of the neurons of a layer from unit `start` on, as many as a file holds."""
    own = (pc.field("layer") == layer) & (pc.field("unit") >= start) & (pc.field("unit") < start + BATCH)
    # Of neurons that no concept ranks, most of a wide model, nothing is known that a page could show.
    neurons = run.rows("neurons", own & (pc.field("n_concepts") > 0)).sort_by("unit").to_pylist()
    examples: dict[int, list[dict[str, Any]]] = defaultdict(list)
    if neurons:
        rows = run.rows("examples", own & (pc.field("sign") == 1)).sort_by(
            [("unit", "ascending"), ("rank", "ascending")]
        )
        for row in example_rows(run, rows):
            examples[row["unit"]].append(_activation(row["caption"] or "", row["activation"]))
    samples = len(run)
    return [
        {
            "feature_index": row["unit"],
            "pos_str": row["tokens"],
            "neg_str": row["suppressed"],
            "frac_nonzero": row["n_active"] / max(row["n_tokens"], 1),
            "n_prompts_total": samples,
            # The mean, because the format has one length for all prompts.
            "n_tokens_in_prompt": math.ceil(row["n_tokens"] / max(samples, 1)),
            "dataset": Path(run.info["settings"]["data"]).name,
            "activations": examples[row["unit"]],
            # The reader expects these fields, even if there is nothing in them.
            **{name: [] for name in EMPTY},
        }
        for row in neurons
    ]


def _activation(caption: str, value: float) -> dict[str, Any]:
    return {
        "tokens": [caption],
        "values": [value],
        "bin_min": value,
        "bin_max": value,
        "bin_contains": 1.0,
        "qualifying_token_index": 0,
    }
