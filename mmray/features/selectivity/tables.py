"""Arrow schemas of `mmray selectivity`: the tables that it adds to a run, and what a unit of its work commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field

ANALYSIS = (
    field("label_kind", pa.string(), "language, domain, or another column"),
    field("method", pa.string(), "lape or contribution"),
    field("module", pa.string(), "language, vision or projector"),
    field("modality", pa.string(), "text, image or both: the tokens looked at"),
)
"""What tells one analysis of a run from another; a table holds the rows of all of them."""

INTERVAL = (
    field("low", pa.float64(), "2.5th percentile of the change, bootstrap over images"),
    field("high", pa.float64(), "97.5th percentile of the change"),
    field("n", pa.int64(), "samples"),
)

TABLES: dict[str, pa.Schema] = {
    # A row is a neuron of a label.
    "selectivity": pa.schema(
        [
            *ANALYSIS,
            field("label", pa.string()),
            field("rank", pa.int32(), "from 1, within the label"),
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("score", pa.float64(), "lape: nats, lower is more selective; contribution: logits, higher is"),
            field("amount", pa.float64(), "lape: part of the label's tokens; contribution: logits a token"),
            field("magnitude_entropy", pa.float64(), "nats, of the root mean square activation over the labels"),
            field("p_value", pa.float64(), "part of shuffled labels whose score is as good; null without any"),
            field("stability", pa.float64(), "part of the bootstrap draws that choose it for the label"),
        ]
    ),
    # A row is a label.
    "selective_labels": pa.schema(
        [
            *ANALYSIS,
            field("label", pa.string()),
            field("samples", pa.int64()),
            field("tokens", pa.int64()),
            field("neurons", pa.int64(), "chosen for the label"),
            field("union", pa.int64(), "chosen in all"),
            field("cut", pa.float64(), "score of the last one chosen; null without any"),
            field("chance", pa.float64(), "neurons that reach the cut with shuffled labels, mean"),
            field("stability", pa.float64(), "mean Jaccard index with the choice of bootstrap draws"),
            field("layers", pa.list_(pa.int64()), "chosen neurons of each layer"),
        ]
    ),
    # A row is a measure of one label's samples while one label's neurons are zeroed.
    "interventions": pa.schema(
        [
            *ANALYSIS,
            field("masked", pa.string(), "label whose neurons are zeroed"),
            field("control", pa.string(), "selected, random (as many of each layer), shuffled (chosen by chance)"),
            field("neurons", pa.int64(), "zeroed"),
            field("label", pa.string(), "label of the samples measured"),
            field("measure", pa.string(), "nll (nats a token) or accuracy"),
            field("before", pa.float64()),
            field("after", pa.float64()),
            field("change", pa.float64()),
            *INTERVAL,
        ]
    ),
    # A row is a caption written with one label's prompt while neurons are steered to another's.
    "steering": pa.schema(
        [
            *ANALYSIS,
            field("source", pa.string()),
            field("target", pa.string()),
            field("steering", pa.string(), "which neurons, set to what, where"),
            field("neurons", pa.int64(), "steered"),
            field("sample_id", pa.string()),
            field("before", pa.string()),
            field("after", pa.string()),
            field("label_before", pa.string(), "the label whose captions explain the words best"),
            field("label_after", pa.string()),
            field("words_before", pa.float64(), "part of the words that the target's captions explain best"),
            field("words_after", pa.float64()),
        ]
    ),
    # A row is a layer seen through the final norm and the unembedding.
    "stages": pa.schema(
        [
            *ANALYSIS,
            field("masked", pa.string(), "label whose neurons are zeroed; none: null"),
            field("layer", pa.int16(), "output of this decoder block"),
            field("position", pa.string(), "image or text"),
            field("n_tokens", pa.int64()),
            field("entropy", pa.float64(), "nats, of the next token, mean over positions"),
            field("agreement", pa.float64(), "part of the positions with the last layer's likeliest token"),
            field("shift", pa.float64(), "change of the hidden state under the mask, in parts of its norm"),
            field("tokens", pa.list_(pa.string()), "those most often the likeliest, most often first"),
            field("shares", pa.list_(pa.float64()), "part of the positions at which each is"),
        ]
    ),
}
"""The tables that an analysis of labels adds to a run."""

PARTS: dict[str, pa.Schema] = {
    "sums": pa.schema(
        [
            field("quantity", pa.string(), "active, squares, contribution; of steering: spread, course NN"),
            field("replicate", pa.int32(), "0: the data as it is"),
            field("label", pa.string()),
            field("n_tokens", pa.int64()),
            field("values", pa.large_binary(), "sum over tokens, a number a neuron: of active int32, else fp64"),
        ]
    ),
    # A row is a sample read under one mask; without one `masked` is null.
    "measurements": pa.schema(
        [
            field("masked", pa.string()),
            field("control", pa.string()),
            field("label", pa.string()),
            field("sample_id", pa.string()),
            field("measure", pa.string()),
            field("total", pa.float64()),
            field("count", pa.float64()),
        ]
    ),
    "replies": pa.schema([field("sample_id", pa.string()), field("before", pa.string()), field("after", pa.string())]),
    # A row is a layer, kind of position and mask: sums over positions.
    "lens": pa.schema(
        [
            field("masked", pa.string()),
            field("layer", pa.int16()),
            field("position", pa.string()),
            field("n_tokens", pa.int64()),
            field("entropy", pa.float64(), "sum"),
            field("agreed", pa.int64()),
            field("shift", pa.float64(), "sum"),
            field("tokens", pa.list_(pa.string())),
            field("counts", pa.list_(pa.int64())),
        ]
    ),
}
"""What a unit of work of `mmray selectivity` commits."""
