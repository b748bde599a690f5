"""Arrow schemas of `mmray selectivity`: the tables that it adds to a run, and what a unit of its work commits."""

from __future__ import annotations

import pyarrow as pa


def column(name: str, kind: pa.DataType, unit: str = "") -> pa.Field:
    """Return a column with its unit in the metadata."""
    return pa.field(name, kind, metadata={"unit": unit} if unit else None)


ANALYSIS = (
    column("label_kind", pa.string(), "language, domain, or another column"),
    column("method", pa.string(), "lape or contribution"),
    column("module", pa.string(), "language, vision or projector"),
    column("modality", pa.string(), "text, image or both: the tokens looked at"),
)
"""What tells one analysis of a run from another; a table holds the rows of all of them."""

INTERVAL = (
    column("low", pa.float64(), "2.5th percentile of the change, bootstrap over samples"),
    column("high", pa.float64(), "97.5th percentile of the change"),
    column("n", pa.int64(), "samples"),
)

LABEL_SCHEMAS: dict[str, pa.Schema] = {
    # A row is a neuron of a label.
    "selectivity": pa.schema(
        [
            *ANALYSIS,
            column("label", pa.string()),
            column("rank", pa.int32(), "from 1, within the label"),
            column("layer", pa.int16()),
            column("unit", pa.int32()),
            column("neuron", pa.string()),
            column("score", pa.float64(), "lape: nats, lower is more selective; contribution: logits, higher is"),
            column("amount", pa.float64(), "lape: part of the label's tokens; contribution: logits a token"),
            column("magnitude_entropy", pa.float64(), "nats, of the root mean square activation over the labels"),
            column("p_value", pa.float64(), "part of shuffled labels whose score is as good; null without any"),
            column("stability", pa.float64(), "part of the bootstrap draws that choose it for the label"),
        ]
    ),
    # A row is a label.
    "selective_labels": pa.schema(
        [
            *ANALYSIS,
            column("label", pa.string()),
            column("samples", pa.int64()),
            column("tokens", pa.int64()),
            column("neurons", pa.int64(), "chosen for the label"),
            column("union", pa.int64(), "chosen in all"),
            column("cut", pa.float64(), "score of the last one chosen"),
            column("chance", pa.float64(), "neurons that reach the cut with shuffled labels, mean"),
            column("stability", pa.float64(), "mean Jaccard index with the choice of bootstrap draws"),
            column("layers", pa.list_(pa.int64()), "chosen neurons of each layer"),
        ]
    ),
    # A row is a measure of one label's samples while one label's neurons are zeroed.
    "interventions": pa.schema(
        [
            *ANALYSIS,
            column("masked", pa.string(), "label whose neurons are zeroed"),
            column("control", pa.string(), "selected, random (as many of each layer), shuffled (chosen by chance)"),
            column("neurons", pa.int64(), "zeroed"),
            column("label", pa.string(), "label of the samples measured"),
            column("measure", pa.string(), "nll (nats a token) or accuracy"),
            column("before", pa.float64()),
            column("after", pa.float64()),
            column("change", pa.float64()),
            *INTERVAL,
        ]
    ),
    # A row is a caption written with one label's prompt while neurons are steered to another's.
    "steering": pa.schema(
        [
            *ANALYSIS,
            column("source", pa.string()),
            column("target", pa.string()),
            column("steering", pa.string(), "which neurons, set to what, where"),
            column("neurons", pa.int64(), "steered"),
            column("sample_id", pa.string()),
            column("before", pa.string()),
            column("after", pa.string()),
            column("label_before", pa.string(), "the label whose captions explain the words best"),
            column("label_after", pa.string()),
            column("words_before", pa.float64(), "part of the words that the target's captions explain best"),
            column("words_after", pa.float64()),
        ]
    ),
    # A row is a layer seen through the final norm and the unembedding.
    "stages": pa.schema(
        [
            *ANALYSIS,
            column("masked", pa.string(), "label whose neurons are zeroed; none: null"),
            column("layer", pa.int16(), "output of this decoder block"),
            column("position", pa.string(), "image or text"),
            column("n_tokens", pa.int64()),
            column("entropy", pa.float64(), "nats, of the next token, mean over positions"),
            column("agreement", pa.float64(), "part of the positions with the last layer's likeliest token"),
            column("shift", pa.float64(), "change of the hidden state under the mask, in parts of its norm"),
            column("tokens", pa.list_(pa.string()), "those most often the likeliest, most often first"),
            column("shares", pa.list_(pa.float64()), "part of the positions at which each is"),
        ]
    ),
}
"""The tables that an analysis of labels adds to a run."""

PASS_SCHEMAS: dict[str, pa.Schema] = {
    "sums": pa.schema(
        [
            column("quantity", pa.string(), "active, squares, contribution; of steering: spread, course NN"),
            column("replicate", pa.int32(), "0: the data as it is"),
            column("label", pa.string()),
            column("n_tokens", pa.int64()),
            column("values", pa.large_binary(), "fp64 sum over tokens, a number a neuron"),
        ]
    ),
    # A row is a sample read under one mask; without one `masked` is null.
    "measurements": pa.schema(
        [
            column("masked", pa.string()),
            column("control", pa.string()),
            column("label", pa.string()),
            column("sample_id", pa.string()),
            column("measure", pa.string()),
            column("total", pa.float64()),
            column("count", pa.float64()),
        ]
    ),
    "replies": pa.schema(
        [column("sample_id", pa.string()), column("before", pa.string()), column("after", pa.string())]
    ),
    # A row is a layer, kind of position and mask: sums over positions.
    "lens": pa.schema(
        [
            column("masked", pa.string()),
            column("layer", pa.int16()),
            column("position", pa.string()),
            column("n_tokens", pa.int64()),
            column("entropy", pa.float64(), "sum"),
            column("agreed", pa.int64()),
            column("shift", pa.float64(), "sum"),
            column("tokens", pa.list_(pa.string())),
            column("counts", pa.list_(pa.int64())),
        ]
    ),
}
"""What a unit of work of `mmray selectivity` commits."""
