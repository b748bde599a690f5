"""Schemas of the tables that a run gets after its census: what its neurons mean, and where they look."""

from __future__ import annotations

import pyarrow as pa

from mmray.features import FEATURES
from mmray.features.selectivity.tables import LABEL_SCHEMAS
from mmray.runs.tables import COUNT, EVALUATION_SCHEMAS, SCHEMAS, field

INTERVAL = "95 %, over images: Wilson of shares, else bootstrap"

MEASURED = (
    field("value", pa.float64()),
    field("low", pa.float64(), INTERVAL),
    field("high", pa.float64(), INTERVAL),
    field("n", pa.int64(), "claims, answers or samples"),
    field("protocol", pa.string()),
)

DERIVED: dict[str, pa.Schema] = {
    "properties": pa.schema(
        [
            field("property", pa.string(), "sensitivity, specificity, causal, …"),
            field("measure", pa.string()),
            field("concept", pa.string(), "null: over all concepts measured"),
            field("method", pa.string(), "what ranked the neurons, or the control that drew them"),
            field("neurons", pa.int32(), COUNT),
            field("strength", pa.float64(), "of noise: parts of the rows' own size; of amplification: the factor"),
            field("value", pa.float64()),
            field("low", pa.float64(), INTERVAL),
            field("high", pa.float64(), INTERVAL),
            field("n", pa.int64(), "images; of what a ranking as a whole has, such as its hit rate, concepts"),
            field("protocol", pa.string()),
        ]
    ),
    "heatmaps": pa.schema(
        [
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("method", pa.string(), "what ranked the neurons"),
            field("neurons", pa.int32(), COUNT),
            field("rows", pa.int16(), "patches"),
            field("columns", pa.int16(), "patches"),
            field("values", pa.list_(pa.float32()), "mean activation of the neurons over each patch, row by row"),
            field("covers", pa.list_(pa.float32()), "x, y, width, height of what the patches cover, in its parts"),
            field("box", pa.list_(pa.float32()), "x, y, width, height of the concept's object, in parts of the image"),
            field("hit", pa.bool_(), "the highest point lies in the box; null without one"),
            field("iou", pa.float32(), "of the mask above the 95th percentile with the box; null without one"),
        ]
    ),
    "saliency": pa.schema(
        [
            field("measure", pa.string(), "pointing_game, iou, max_box_accuracy, deletion, insertion"),
            field("method", pa.string(), "what drew the maps, or chance"),
            field("value", pa.float64()),
            field("low", pa.float64(), INTERVAL),
            field("high", pa.float64(), INTERVAL),
            field("words", pa.int64(), COUNT),
            field("n", pa.int64(), "images"),
            field("protocol", pa.string()),
        ]
    ),
    "saliency_maps": pa.schema(
        [
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("method", pa.string(), "what drew the map"),
            field("rows", pa.int16(), "points"),
            field("columns", pa.int16(), "points"),
            field("values", pa.list_(pa.float32()), "in the method's own unit, row by row"),
            field("covers", pa.list_(pa.float32()), "x, y, width, height of what the map covers, in its parts"),
            field("boxes", pa.list_(pa.list_(pa.float32())), "of the concept's object: x, y, width, height in 0..1"),
            field("hit", pa.bool_(), "the highest point lies in a box"),
        ]
    ),
    "edits": pa.schema(
        [
            field("edit", pa.string(), "its name, and its folder in RUN/edits"),
            field("kind", pa.string(), "swap, suppress, hallucination or noise"),
            field("source", pa.string()),
            field("target", pa.string()),
            field(
                "pairs",
                pa.list_(pa.struct([field("context", pa.string()), field("word", pa.string())])),
                "of a hallucination edit: what is seen, and what the model claims with it",
            ),
            field("method", pa.string()),
            field("rows_changed", pa.int32(), "neurons"),
            field("parameters_changed", pa.int64(), COUNT),
            field("norm", pa.float64(), "L2, of all that is added"),
            field("seconds", pa.float64()),
        ]
    ),
    "evaluations": pa.schema(
        [
            field("edit", pa.string()),
            field("measure", pa.string()),
            field("before", pa.float64()),
            field("after", pa.float64()),
            field("low", pa.float64(), f"of after: {INTERVAL}"),
            field("high", pa.float64(), f"of after: {INTERVAL}"),
            field("n", pa.int64(), "images; of text locality questions, of MMEdit records"),
            field("protocol", pa.string()),
        ]
    ),
    "edit_captions": pa.schema([field("edit", pa.string()), *EVALUATION_SCHEMAS["captions"]]),
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
    **LABEL_SCHEMAS,
}
"""The tables that a run offers once they are made."""

TABLES: dict[str, pa.Schema] = SCHEMAS | DERIVED
"""Every table that a run may have."""

MADE_BY = {
    table: feature.command for feature in FEATURES.values() if feature.name != "census" for table in feature.tables
}
"""Table → the command that makes it, unless the census does."""

PROPERTY_SCHEMAS: dict[str, pa.Schema] = {
    # A row is an image's part in one measure; the totals over images make the measure.
    "observations": pa.schema(
        [
            *(DERIVED["properties"].field(name) for name in ("property", "measure", "method", "neurons", "strength")),
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("value", pa.float64(), "sum"),
            field("of", pa.float64(), "what the sum is divided by"),
        ]
    ),
    "heatmaps": DERIVED["heatmaps"],
    "errors": SCHEMAS["errors"],
}
"""What one unit of work of the properties commits."""

SALIENCY_SCHEMAS: dict[str, pa.Schema] = {
    # A row is a word's part in one measure; the totals over images make the measure.
    "observations": pa.schema(
        [
            field("measure", pa.string()),
            field("method", pa.string()),
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("sums", pa.list_(pa.float64()), "the last one is what the others are divided by"),
        ]
    ),
    "saliency_maps": DERIVED["saliency_maps"],
    "errors": SCHEMAS["errors"],
}
"""What one unit of work of the saliency measures commits."""

OPINION_SCHEMAS: dict[str, pa.Schema] = {
    **{name: DERIVED[name] for name in ("claims", "mistakes", "answers")},
    "errors": SCHEMAS["errors"],
}
"""What units of work of second opinions and of moved embeddings commit."""
