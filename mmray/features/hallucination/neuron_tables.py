"""Tables of `mmray hallucination --neurons`, with units, and the parts of its passes."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field, ordered
from mmray.statistics.tables import MEASURED

_MENTION = [
    field("sample_id", pa.string()),
    field("image", pa.string(), "key of the image, shared by all its samples"),
    field("fold", pa.string(), "fit: neurons are chosen and the probe is fitted on it; test: measured on it"),
    field("word", pa.string(), "the object"),
    field("mention", pa.int32(), "number of the mention in its caption, from 0"),
    field("hallucinated", pa.bool_(), "whether the image lacks the object"),
    field("position", pa.int32(), "number of its first token in the caption, from 0"),
    field("length", pa.int32(), "tokens of the caption"),
    field("log_prob", pa.float64(), "the model's own, of the noun's tokens; nats"),
    field("text", pa.string(), "the caption"),
]

TABLES: dict[str, pa.Schema] = {
    "hallucination_neurons": ordered(
        [
            field("layer", pa.int32()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("weight", pa.float64(), "of the probe: log-odds of hallucination per deviation of the share"),
            field("effect", pa.float64(), "Cohen's d of the share, hallucinated above true mentions; fit images"),
            field("held_out_effect", pa.float64(), "the same on test images"),
            field("low", pa.float64(), "95 % of the held-out effect, bootstrap over images"),
            field("high", pa.float64(), "95 % of the held-out effect, bootstrap over images"),
            field("activation_effect", pa.float64(), "Cohen's d of the activation; fit images"),
            field("contribution_effect", pa.float64(), "Cohen's d of the contribution to the word said; fit images"),
            field("true_activation", pa.float64(), "mean activation at true mentions; fit images"),
            field("hallucinated_activation", pa.float64(), "mean activation at hallucinated mentions; fit images"),
        ],
        "layer",
        "unit",
    ),
    "hallucination_probe": pa.schema(
        [
            field("judge", pa.string(), "who says which mentions are hallucinated"),
            field("measure", pa.string(), "auroc, caught, or gain: a difference of aurocs"),
            field("neurons", pa.int64(), "neurons that the judge uses; null: none"),
            *MEASURED,
        ]
    ),
    "hallucination_mentions": pa.schema([*_MENTION, field("score", pa.float64(), "the probe's log-odds")]),
    "hallucination_doses": pa.schema(
        [
            field("neurons", pa.string(), "none, probe, raised, lowered; random …: as many of the same layers"),
            field(
                "change", pa.string(), "scale; true mean: as at true mentions; a decoding; ban below; or both of these"
            ),
            field("dose", pa.float64(), "factor of the activations, strength of a decoding, or probability"),
            field("count", pa.int64(), "neurons changed"),
            field("measure", pa.string()),
            *MEASURED,
        ]
    ),
}
"""By name."""

PARTS: dict[str, pa.Schema] = {
    "mentions": pa.schema(
        [
            *_MENTION,
            field("confidence", pa.float64(), "the detector's; null: no detector"),
            field("tokens", pa.list_(pa.int32()), "the caption's"),
        ]
    ),
    "features": pa.schema(
        [
            field("sample_id", pa.string()),
            field("mention", pa.int32()),
            field("shares", pa.large_binary(), "fp32 per candidate, then per control"),
        ]
    ),
    "dosed": pa.schema(
        [
            field("condition", pa.int32(), "number of the intervention"),
            field("sample_id", pa.string()),
            field("image", pa.string()),
            field("measure", pa.string()),
            field("sums", pa.list_(pa.float64()), "what the measure adds up"),
        ]
    ),
}
"""By name: what units commit, besides the moments of `mmray.features.hallucination.contrast`."""
