"""How active neurons are, and their most extreme samples, added up shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Shaped, UInt64
from numpy import ndarray

from mmray.features.census.activity import KEY, LISTS, ActivityKey, activity_lists
from mmray.features.census.ranking import locate_index
from mmray.features.census.tables import PARTS, TABLES
from mmray.neurons.tables import EXAMPLES
from mmray.runs.tables import list_values

BLOCK = 1 << 15
"""Neurons whose examples are sorted, or become a table, at a time."""


@dataclass(frozen=True)
class Samples:
    """The samples of a shard, in order of its captions."""

    COLUMNS: ClassVar = ("sample_id", "image", "shard_id")
    """Of captions, that they are made from."""
    sample_id: Shaped[ndarray, " sample"]
    image: UInt64[ndarray, " sample"]
    """A number that samples of one image share."""
    shard_id: Shaped[ndarray, " sample"]

    @classmethod
    def of(cls, captions: pa.Table) -> Samples:
        """Return the samples of a shard's captions."""
        sample_ids = np.array(captions["sample_id"].to_pylist(), object)
        return cls(sample_ids, _image_numbers(captions), captions["shard_id"].to_numpy())

    def images(self) -> dict[str, np.uint64]:
        """Return the number of each sample's image."""
        return dict(zip(self.sample_id, self.image, strict=True))


class NeuronSums:
    """Adds up activity and examples shard by shard, of so many neurons from the `first` on; lists run over these."""

    def __init__(self, neurons: int, first: int = 0) -> None:
        self.first = first
        self.activity: dict[ActivityKey, list[ndarray]] = {}
        """Tokens at which a neuron is active, sum and sum of squares."""
        self.tokens: dict[ActivityKey, int] = {}
        self.examples = {sign: Examples(sign, neurons) for sign in (1, -1)}

    def add(self, activity: pa.Table, examples: pa.Table, samples: Samples) -> None:
        """Add one shard; the column `sample` of `examples` is the row in its captions."""
        for (key, numbers), tokens in zip(
            activity_lists(activity).items(), activity["n_tokens"].to_pylist(), strict=True
        ):
            self.tokens[key] = self.tokens.get(key, 0) + tokens
            if key not in self.activity:
                self.activity[key] = [np.zeros(len(part)) for part in numbers]
            # In place: with many labels these arrays are the largest part of the merge.
            for total, added in zip(self.activity[key], numbers, strict=True):
                total += added
        signs = examples["sign"].to_numpy()
        columns = [list_values(examples[name]) for name in ("activation", "sample", "position")]
        for sign, extremes in self.examples.items():
            ranks = np.flatnonzero(signs == sign)
            if len(ranks):
                own = [[values[rank] for rank in ranks] for values in columns]
                extremes.add(own[0], own[1], own[2], samples)

    def table(self) -> pa.Table:
        """Return the activity as the part of a shard."""
        schema = PARTS["activity"]
        keys = zip(*self.activity, strict=True) if self.activity else [()] * len(KEY)
        lists = zip(*self.activity.values(), strict=True) if self.activity else [()] * len(LISTS)
        columns = dict(zip(KEY, keys, strict=True)) | dict(zip(LISTS, lists, strict=True))
        return pa.table({**columns, "n_tokens": list(self.tokens.values())}, schema=schema)

    @classmethod
    def of(cls, activity: pa.Table) -> NeuronSums:
        """Return sums with this activity, and without examples."""
        found = cls(0)
        found.activity = {key: list(lists) for key, lists in activity_lists(activity).items()}
        found.tokens = dict(zip(found.activity, activity["n_tokens"].to_pylist(), strict=True))
        return found


class Examples:
    """The most extreme samples of every neuron on one side, [rank, neuron], each of a different image."""

    def __init__(self, sign: int, neurons: int) -> None:
        self.sign = sign
        self.activation = np.full((EXAMPLES, neurons), -sign * np.inf, np.float32)
        self.position = np.zeros((EXAMPLES, neurons), np.int32)
        self.image = np.zeros((EXAMPLES, neurons), np.uint64)
        self.sample_id = np.zeros((EXAMPLES, neurons), object)
        self.shard_id = np.zeros((EXAMPLES, neurons), np.int32)

    def add(
        self, activation: Sequence[ndarray], sample: Sequence[ndarray], position: Sequence[ndarray], of: Samples
    ) -> None:
        """Add one shard's ranks, each a row over all neurons; of equal activations that of the earlier shard is higher.

        A shard has the highest sample of each of its EXAMPLES highest images, so the result is that of all samples.
        """
        # Late in a long run, few neurons have a new extreme in a shard.
        changed = np.flatnonzero(self.sign * activation[0] > self.sign * self.activation[-1])
        for first in range(0, len(changed), BLOCK):
            part = changed[first : first + BLOCK]
            new, index, places = (
                np.stack([values.take(part) for values in rows]) for rows in (activation, sample, position)
            )
            self._add(part, (new, places, of.image[index], of.sample_id[index], of.shard_id[index]))

    def _add(self, neurons: Int64[ndarray, " neuron"], added: tuple[ndarray, ...]) -> None:
        """Add samples to some neurons: activation, position, image, sample id and shard, each [rank, neuron]."""
        held: tuple[ndarray, ...] = (self.activation, self.position, self.image, self.sample_id, self.shard_id)
        before, after = [np.take(old, neurons, axis=1) for old in held], list(added)
        # Of two samples of one image only the higher stays, or the earlier: the other sinks below every finite
        # activation. Those held have no two; those added do if samples without an image share an id.
        image = after[2]
        after[0][np.stack([(image[:rank] == own).any(axis=0) for rank, own in enumerate(image)])] = -self.sign * np.inf
        same = before[2][:, None] == image
        higher = self.sign * after[0] > self.sign * before[0][:, None]
        before[0][(same & higher).any(axis=1)] = -self.sign * np.inf
        after[0][(same & ~higher).any(axis=0)] = -self.sign * np.inf
        grown = [np.vstack(both) for both in zip(before, after, strict=True)]
        order = np.argsort(-self.sign * grown[0], axis=0, kind="stable")[:EXAMPLES]
        # Places in the flattened arrays, found once for all of them.
        place = order * len(neurons) + np.arange(len(neurons))
        for old, values in zip(held, grown, strict=True):
            old[:, neurons] = values.take(place)

    def extreme(self) -> ndarray:
        """Return each neuron's highest (lowest) activation, 0 if it has none."""
        return np.where(np.isfinite(self.activation[0]), self.activation[0], np.float32(0))


def example_tables(sums: NeuronSums, widths: Sequence[int]) -> Iterator[pa.Table]:
    """Yield one row per neuron, side and rank, in this order, for neurons with a counted token."""
    sides = list(sums.examples.values())
    neurons = sides[0].activation.shape[1]
    layer, unit = locate_index(widths, np.arange(sums.first, sums.first + neurons))
    for start in range(0, neurons, BLOCK):
        part = slice(start, start + BLOCK)
        joined = {
            name: np.stack([getattr(one, name)[:, part] for one in sides], axis=1).transpose(2, 1, 0)
            for name in ("activation", "sample_id", "position", "shard_id")
        }
        # Ranks without a sample still have the infinite start value.
        neuron, side, ranks = kept = np.nonzero(np.isfinite(joined["activation"]))
        yield pa.table(
            {
                "layer": layer[part][neuron],
                "unit": unit[part][neuron],
                "sign": np.array([one.sign for one in sides], np.int8)[side],
                "rank": ranks + 1,
                "sample_id": pa.array(joined.pop("sample_id")[kept], pa.string()),
                **{name: values[kept] for name, values in joined.items()},
            },
            schema=TABLES["examples"],
        )


def neuron_table(
    widths: Sequence[int],
    names: pa.StringArray,
    sums: NeuronSums,
    extremes: Mapping[str, ndarray],
    concepts: Int64[ndarray, " neuron"],
    decoded: pa.Table,
) -> pa.Table:
    """Return one row per neuron: its activity over all counted tokens, and the tokens it writes.

    `extremes` are the columns `max` and `min`, `concepts` how many concepts have the neuron in their top-k.
    """
    neurons = sum(widths)
    layer, unit = locate_index(widths, np.arange(neurons))
    # The label "all" is every sample's; its modalities, image and text, add up to all tokens.
    of_all = [own for key, own in sums.activity.items() if key[:2] == ("language", "all")]
    active, total, squares = np.sum(of_all, axis=0) if of_all else np.zeros((3, neurons))
    tokens = sum(count for key, count in sums.tokens.items() if key[:2] == ("language", "all"))
    mean = total / max(tokens, 1)
    return pa.table(
        {
            "layer": layer,
            "unit": unit,
            "neuron": names,
            "n_concepts": concepts,
            "n_tokens": np.full(neurons, tokens),
            "n_active": active.astype(np.int64),
            "mean": mean,
            "std": np.sqrt(np.maximum(0, squares / max(tokens, 1) - mean**2)),
            **extremes,
            "tokens": decoded["tokens"],
            "suppressed": decoded["suppressed"],
        },
        schema=TABLES["neurons"],
    )


def activity_table(module_widths: Mapping[str, Sequence[int]], sums: NeuronSums) -> pa.Table:
    """Return one row per module, label, modality and neuron."""
    tables = [TABLES["activity"].empty_table()]
    for key, (active, total, squares) in sorted(sums.activity.items()):
        constants = dict(zip(("module", "label_kind", "label", "modality"), key, strict=True))
        widths = module_widths[key[0]]
        neurons = sum(widths)
        layer, unit = locate_index(widths, np.arange(neurons))
        tables.append(
            pa.table(
                {
                    **{name: pa.repeat(value, neurons) for name, value in constants.items()},
                    "layer": layer,
                    "unit": unit,
                    "n_tokens": np.full(neurons, sums.tokens[key]),
                    "n_active": active.astype(np.int64),
                    "sum": total,
                    "sum_squares": squares,
                },
                schema=TABLES["activity"],
            )
        )
    return pa.concat_tables(tables)


def _image_numbers(captions: pa.Table) -> UInt64[ndarray, " sample"]:
    """Return a number per row of `captions` that rows of one image share; a sample without an image has its own.

    They are 64 bits of digests, so no list of all images has to be kept.
    """
    sample_ids = captions["sample_id"].to_pylist()
    # Runs of earlier versions have no column `image`.
    images = captions["image"].to_pylist() if "image" in captions.column_names else [None] * len(sample_ids)
    return np.array(
        [
            # The zero byte keeps a sample id from looking like the bytes of an image.
            int(image or hashlib.sha256(b"\0" + sample_id.encode()).hexdigest()[:16], 16)
            for sample_id, image in zip(sample_ids, images, strict=True)
        ],
        np.uint64,
    )
