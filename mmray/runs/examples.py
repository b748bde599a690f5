"""A neuron's extreme samples, each with its caption and the token at which the neuron is most (least) active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from mmray.runs.run import Run

COLUMNS = ["sample_id", "caption", "token_spans", "text_start", "image_spans"]
"""Columns of `captions` that say what is at a position; null in runs of earlier versions, except the first two."""


def example_rows(run: Run, examples: pa.Table) -> list[dict[str, Any]]:
    """Return rows of `examples` as dicts, with three more keys that are None where they don't apply.

    `caption`; `token`: start and stop of the characters of the caption that the token covers; `image_token`: its number
    among the sample's image tokens, from 1, and how many there are.
    """
    wanted = pc.field("sample_id").isin(examples["sample_id"].unique())
    # Captions are in the order of shards; in runs of earlier versions examples don't name theirs.
    if not examples["shard_id"].null_count:
        wanted &= pc.field("shard_id").isin(examples["shard_id"].unique())
    by_sample = {row["sample_id"]: row for row in run.rows("captions", wanted, COLUMNS).to_pylist()}
    return [row | _place(by_sample.get(row["sample_id"], {}), row["position"]) for row in examples.to_pylist()]


def _place(sample: Mapping[str, Any], position: int) -> dict[str, Any]:
    """Return the caption of a row of `captions`, and what is at a position of its sequence."""
    token = image_token = None
    if sample.get("text_start") is not None:
        place = position - sample["text_start"]
        if 0 <= place < len(sample["token_spans"]):
            token = tuple(sample["token_spans"][place].values())
        indices = [index for span in sample["image_spans"] for index in range(span["start"], span["stop"])]
        if position in indices:
            image_token = indices.index(position) + 1, len(indices)
    return {"caption": sample.get("caption"), "token": token, "image_token": image_token}
