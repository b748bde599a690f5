"""Tables of `mmray hallucination` and `mmray perturb`, with units. Units of work commit parts of the same schemas."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field
from mmray.statistics.tables import MEASURED

TABLES: dict[str, pa.Schema] = {
    "claims": pa.schema(
        [
            field("sample_id", pa.string()),
            field("image", pa.string(), "key of the image, shared by all its samples"),
            field(
                "kind",
                pa.string(),
                "caption; for questions: present, random, popular, adversarial or file",
            ),
            field("word", pa.string()),
            field("claimed", pa.bool_(), "the model says it is there; null: neither yes nor no"),
            field("present", pa.bool_(), "whether the image has it"),
            field("confidence", pa.float64(), "the detector's: highest probability of any box"),
            field("log_prob", pa.float64(), "the model's own: of the noun's tokens, or of yes against no; nats"),
            field("box", pa.list_(pa.float64()), "the detector's best box for it: x, y, width, height, 0 to 1"),
            field("mistaken_for", pa.string(), "for a wrong claim: the object under the box"),
            field("mistaken_box", pa.list_(pa.float64()), "that object's box"),
            field("text", pa.string(), "caption or answer"),
        ]
    ),
    "opinions": pa.schema(
        [
            field("claims", pa.string(), "caption, question, yes or no"),
            field("measure", pa.string()),
            field("judge", pa.string(), "detector or language model; null: neither"),
            field("bin", pa.float64(), "for reliability: the bin's lower edge"),
            field("confidence", pa.float64(), "for reliability: the bin's mean confidence"),
            *MEASURED,
        ]
    ),
    "mistakes": pa.schema(
        [
            field("sample_id", pa.string()),
            field("kind", pa.string()),
            field("word", pa.string()),
            field("text", pa.string()),
            field("confidence", pa.float64()),
            field("log_prob", pa.float64()),
            field("mistaken_for", pa.string()),
            field("picture", pa.binary(), "PNG; red: the claimed object's best box, blue: the object that is there"),
        ]
    ),
    "answers": pa.schema(
        [
            field("sample_id", pa.string()),
            field("image", pa.string(), "key of the image, shared by all its samples"),
            field("condition", pa.string(), "original, one step, steps, plain steps, unrelated, random N, …"),
            field("source", pa.string()),
            field("target", pa.string()),
            field("about", pa.string(), "source, target, unrelated, or question"),
            field("question", pa.string()),
            field("reply", pa.string()),
            field("value", pa.float64(), "the answer; null: the reply has none"),
            field("norm", pa.float64(), "L2 norm of the move"),
            field("relative_norm", pa.float64(), "as a fraction of the embedding's norm"),
            field("source_confidence", pa.float64(), "the detector's, after the move"),
            field("target_confidence", pa.float64(), "the detector's, after the move"),
        ]
    ),
    "bias": pa.schema(
        [
            field("source", pa.string(), "prompt to move away from"),
            field("target", pa.string(), "prompt to move towards"),
            field("question", pa.string()),
            field("condition", pa.string(), "steps or sign step, and their controls unrelated and random, …"),
            field("before", pa.float64(), "mean answer before the move, of those read both times"),
            field("after", pa.float64(), "mean answer after it"),
            *MEASURED,
            field("asked", pa.int64(), "replies under the condition"),
            field("unread_before", pa.int64(), "replies before the move without an answer"),
            field("unread_after", pa.int64(), "replies under the condition without an answer"),
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
"""By name."""
# A table of its own, because a run has the answers of `bias`, and OUT those of `perturb`.
TABLES["bias_answers"] = TABLES["answers"]
