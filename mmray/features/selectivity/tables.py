"""Tables of `mmray selectivity`, and the parts that a unit commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field

ANALYSIS = (
    field("label_kind", pa.string(), "language, domain, or another column"),
    field("method", pa.string(), "lape or contribution"),
    field("module", pa.string(), "language, vision, projector or qformer-text; all: of all modules together"),
    field("modality", pa.string(), "the tokens that count: text (of captions, or qformer-text's), image or all"),
)
"""Columns that distinguish the analyses of a run; a table holds the rows of all of them."""

MODALITIES = ("text", "image", "all")
"""Values of `modality`."""

INTERVAL = (
    field("low", pa.float64(), "2.5th percentile of the change, bootstrap over images"),
    field("high", pa.float64(), "97.5th percentile of the change"),
    field("n", pa.int64(), "samples"),
)

TABLES: dict[str, pa.Schema] = {
    # One row per neuron of a label.
    "selectivity": pa.schema(
        [
            *ANALYSIS,
            field("label", pa.string()),
            field("rank", pa.int32(), "from 1, within the label"),
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("score", pa.float64(), "lape: nats, lower is more selective; contribution: logits, higher is"),
            field("amount", pa.float64(), "lape: fraction of the label's tokens; contribution: logits per token"),
            field("magnitude_entropy", pa.float64(), "nats, of the RMS activation over the labels"),
            field("p_value", pa.float64(), "fraction of shuffles with a score as good; null without shuffles"),
            field("stability", pa.float64(), "fraction of the bootstrap draws that choose it for the label"),
        ]
    ),
    # One row per label.
    "selective_labels": pa.schema(
        [
            *ANALYSIS,
            field("label", pa.string()),
            field("samples", pa.int64()),
            field("tokens", pa.int64()),
            field("neurons", pa.int64(), "chosen for the label"),
            field("union", pa.int64(), "chosen for any label"),
            field("cut", pa.float64(), "score of the last one chosen; null without any"),
            field("chance", pa.float64(), "neurons that reach the cut with shuffled labels, mean"),
            field("stability", pa.float64(), "mean Jaccard index with the choices of bootstrap draws"),
            field("layers", pa.list_(pa.int64()), "chosen neurons per layer"),
        ]
    ),
    # One row per measure of one label's samples while one label's neurons are zeroed.
    "interventions": pa.schema(
        [
            *ANALYSIS,
            field("masked", pa.string(), "label whose neurons are zeroed"),
            field("control", pa.string(), "selected, random (as many per layer), shuffled (chosen by chance)"),
            field("neurons", pa.int64(), "zeroed"),
            field("label", pa.string(), "label of the samples measured"),
            field("measure", pa.string(), "nll (nats per token), perplexity (its exponential) or accuracy"),
            field("protocol", pa.string(), "how it is measured; null in runs of earlier versions"),
            field("before", pa.float64()),
            field("after", pa.float64()),
            field("change", pa.float64()),
            *INTERVAL,
        ]
    ),
    # One row per question and mask, where replies are written.
    "masked_answers": pa.schema(
        [
            *ANALYSIS,
            field("masked", pa.string(), "label whose neurons are zeroed; null: none"),
            field("control", pa.string(), "selected, random or shuffled; null: none"),
            field("label", pa.string(), "label of the sample"),
            field("sample_id", pa.string()),
            field("question", pa.string()),
            field("reply", pa.string()),
            field("score", pa.float64(), "0 to 1, by the label's score"),
        ]
    ),
    # One row per caption that is written with one label's prompt while neurons are steered to another's.
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
            field("words_before", pa.float64(), "fraction of the words that the target's captions explain best"),
            field("words_after", pa.float64()),
        ]
    ),
    # One row per layer and kind of position, read through the final norm and the unembedding.
    "stages": pa.schema(
        [
            *ANALYSIS,
            field("masked", pa.string(), "label whose neurons are zeroed; null: none"),
            field("control", pa.string(), "selected or random; null: none, or a run of an earlier version"),
            field("layer", pa.int16(), "output of this decoder block"),
            field("position", pa.string(), "image or text"),
            field("n_tokens", pa.int64()),
            field("entropy", pa.float64(), "nats, of the next token, mean over positions; null under random masks"),
            field(
                "agreement", pa.float64(), "fraction of positions whose top token is the last layer's; null likewise"
            ),
            field("shift", pa.float64(), "change of the hidden state under the mask, as a fraction of its norm"),
            field("tokens", pa.list_(pa.string()), "the most frequent top tokens, most frequent first"),
            field("shares", pa.list_(pa.float64()), "fraction of positions with each as the top token"),
        ]
    ),
}
"""Tables that `mmray selectivity` adds to a run."""

_MASK = (
    field("module", pa.string(), "of the zeroed neurons; null, as the next two, without a mask"),
    field("masked", pa.string()),
    field("control", pa.string()),
)

PARTS: dict[str, pa.Schema] = {
    "sums": pa.schema(
        [
            field("quantity", pa.string(), "active, squares, contribution; of steering: spread, course NN"),
            field("replicate", pa.int32(), "0: the data as it is"),
            field("label", pa.string()),
            field("n_tokens", pa.int64()),
            field("values", pa.large_binary(), "sum over tokens per neuron: int32 for active, else fp64"),
        ]
    ),
    # One row per sample and mask; `masked` is null without a mask.
    "measurements": pa.schema(
        [
            *_MASK,
            field("label", pa.string()),
            field("sample_id", pa.string()),
            field("measure", pa.string()),
            field("total", pa.float64()),
            field("count", pa.float64()),
        ]
    ),
    "answers": pa.schema([*_MASK, *list(TABLES["masked_answers"])[len(ANALYSIS) + 2 :]]),
    "replies": pa.schema([field("sample_id", pa.string()), field("before", pa.string()), field("after", pa.string())]),
    # One row per layer, kind of position and mask: sums over positions.
    "lens": pa.schema(
        [
            *_MASK,
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
"""Parts that one unit of work commits."""
