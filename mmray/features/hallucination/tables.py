"""Tables of `mmray hallucination` and `mmray perturb`, and what a unit of their work commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import ERRORS, field
from mmray.statistics.tables import MEASURED

TABLES: dict[str, pa.Schema] = {
    "claims": pa.schema(
        [
            field("sample_id", pa.string()),
            field("image", pa.string(), "key of the image, which all samples of it share"),
            field("kind", pa.string(), "caption; of questions present, random, popular or adversarial"),
            field("word", pa.string()),
            field("claimed", pa.bool_(), "the model says that it is there; null: neither yes nor no"),
            field("present", pa.bool_(), "it is among the sample's objects"),
            field("confidence", pa.float64(), "the detector's: highest probability of any box"),
            field("log_prob", pa.float64(), "the model's own, of the noun's tokens, or of yes against no; nats"),
            field("box", pa.list_(pa.float64()), "the detector's best box for it: x, y, width, height, 0 to 1"),
            field("mistaken_for", pa.string(), "of a wrong claim: the object that stands there"),
            field("mistaken_box", pa.list_(pa.float64()), "that object's box"),
            field("text", pa.string(), "caption or answer"),
        ]
    ),
    "opinions": pa.schema(
        [
            field("claims", pa.string(), "caption, question, yes or no"),
            field("measure", pa.string()),
            field("judge", pa.string(), "detector, or language model; null: of neither"),
            field("bin", pa.float64(), "of reliability: the bin's lower edge"),
            field("confidence", pa.float64(), "of reliability: the bin's mean confidence"),
            *MEASURED,
        ]
    ),
    "mistakes": pa.schema(
        [
            *(
                field(name, kind)
                for name, kind in (
                    ("sample_id", pa.string()),
                    ("kind", pa.string()),
                    ("word", pa.string()),
                    ("text", pa.string()),
                    ("confidence", pa.float64()),
                    ("log_prob", pa.float64()),
                    ("mistaken_for", pa.string()),
                )
            ),
            field("picture", pa.binary(), "PNG; red: the claimed object's best box, blue: what stands there"),
        ]
    ),
    "answers": pa.schema(
        [
            field("sample_id", pa.string()),
            field("image", pa.string(), "key of the image, which all samples of it share"),
            field("condition", pa.string(), "original, one step, steps, plain steps, unrelated, random N, …"),
            field("source", pa.string()),
            field("target", pa.string()),
            field("about", pa.string(), "source, target, unrelated, or question"),
            field("question", pa.string()),
            field("reply", pa.string()),
            field("value", pa.float64(), "the answer; null: none could be read"),
            field("norm", pa.float64(), "L2, of the move"),
            field("relative_norm", pa.float64(), "in parts of the embedding's"),
            field("source_confidence", pa.float64(), "the detector's, after the move"),
            field("target_confidence", pa.float64(), "the detector's, after the move"),
        ]
    ),
    "changes": pa.schema(
        [
            field("condition", pa.string()),
            field("about", pa.string(), "null: over all questions"),
            field("measure", pa.string()),
            *MEASURED,
        ]
    ),
}
"""What it adds to a run."""

PARTS: dict[str, pa.Schema] = {
    **{name: TABLES[name] for name in ("claims", "mistakes", "answers")},
    "errors": ERRORS,
}
"""What units of work of second opinions and of moved embeddings commit."""
