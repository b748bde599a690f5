"""Made-up tables of `mmray saliency` and `mmray hallucination` for a run, with pictures wider than their place."""

import io
from pathlib import Path

import pyarrow as pa
from PIL import Image

from mmray.features import table_schemas
from mmray.runs.run import open_run
from tests.support.local_jobs import write_table


def add_judgements(out: Path) -> None:
    """Write the tables."""
    run = open_run(out)
    sample = run.table("captions")["sample_id"][0].as_py()
    picture = io.BytesIO()
    Image.new("RGB", (480, 320), "teal").save(picture, "PNG")
    measured = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 7, "protocol": "so many words, and more of them"}
    map_ = {"concept": "dog", "sample_id": sample, "rows": 2, "columns": 2, "values": [0.0, 1.0, 2.0, 4.0]}
    neuron = {"layer": 1, "unit": 3, "neuron": "L1.u3", "weight": 0.4, "effect": 0.3, "held_out_effect": 0.2}
    mention = {"sample_id": sample, "fold": "test", "word": "dog", "text": "An image of a dog.", "log_prob": -0.1}
    claim = {"sample_id": sample, "kind": "caption", "word": "dog", "text": "An image of a dog.", "mistaken_for": "cat"}
    tables = {
        "saliency": [measured | {"measure": "iou", "method": name, "words": 9} for name in ("gradient", "random")],
        "saliency_maps": [
            map_ | {"method": name, "covers": [0, 0, 1, 1], "boxes": [[0.1, 0.2, 0.3, 0.4]], "hit": True}
            for name in ("gradient", "random")
        ],
        "opinions": [
            measured | {"claims": "caption", "measure": name, "judge": "detector", "bin": 0.5, "confidence": 0.55}
            for name in ("auroc", "reliability")
        ],
        "hallucination_neurons": [neuron | {"low": 0.1, "high": 0.3}],
        "hallucination_probe": [
            measured | {"judge": judge, "measure": "auroc", "neurons": 1}
            for judge in ("neurons", "all three", "random neurons")
        ],
        "hallucination_mentions": [mention | {"hallucinated": kind, "score": 0.5} for kind in (True, False)],
        "hallucination_doses": [
            measured | {"neurons": neurons, "change": "scale", "dose": dose, "count": 1, "measure": measure}
            for neurons in ("raised", "random like raised")
            for dose in (0.0, 2.0)
            for measure in ("chair_i", "recall", "recall relative")
        ],
        "mistakes": [claim | {"confidence": 0.1, "log_prob": -0.2, "picture": picture.getvalue()}] * 3,
    }
    for name, rows in tables.items():
        write_table(run.uri, name, pa.Table.from_pylist(rows, schema=table_schemas()[name]))
