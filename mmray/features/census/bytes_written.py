"""How many bytes a census writes: its shards' parts and its tables, by arithmetic or from the parts of a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

from mmray.features.census.cost import PartBytes
from mmray.features.census.ranking import RANKED
from mmray.neurons.tables import EXAMPLES
from mmray.runs.tables import part_to_bytes

# Bytes below are of compressed columns, measured in a run of the demo.
CANDIDATE, CANDIDATE_INDEX, CANDIDATE_SQUARES = 8.5, 1.4, 7.5
"""Per neuron kept of a concept: sums; its index, if not all are kept; squares, if the concept occurs more than once."""
ACTIVITY, TOTALS, EXAMPLE = 11.0, 14.0, 6.2
"""Per neuron: of a label and modality, of totals, and of one of its examples."""
LISTED = 14.0
"""Per neuron listed at an occurrence."""
CAPTION = 40.0
"""Per sample."""
DECODED = 60.0
"""Per neuron: the tokens that it promotes and suppresses."""
RANKING, ORDERS = 104.0, 1.65
"""Per neuron ranked at a concept, in `rankings` and `neuron_concepts`; three orders of RANKED overlap to so many."""
NEURON_ROW, EXAMPLE_ROW, ACTIVITY_ROW = 89.0, 7.4, 14.0
"""Per row of `neurons`, `examples` and `activity`."""
COPIES = 2
"""Tables are written as a snapshot and as a copy for other tools."""

SQUARES = "score_squares"
"""The column of `concepts` that is null for concepts that occur once."""
PER_NEURON = ("totals", "activity", "examples")
"""Parts that hardly grow with a shard's samples."""


def by_arithmetic(neurons: int, kept: int, groups: int, listed: float) -> PartBytes:
    """Return the bytes of parts.

    `groups` are pairs of a label and a modality whose activity is written, `listed` the neurons listed per sample.
    """
    return PartBytes(
        per_shard=neurons * (groups * ACTIVITY + TOTALS + 2 * EXAMPLES * EXAMPLE),
        per_concept=kept * (CANDIDATE + CANDIDATE_INDEX * (kept < neurons)),
        per_repeated=kept * CANDIDATE_SQUARES,
        per_sample=listed * LISTED + CAPTION,
    )


def of_shard(tables: Mapping[str, pa.Table], samples: int) -> PartBytes:
    """Return the bytes of the parts of a shard with so many samples."""
    concepts = tables["concepts"]
    repeated = len(concepts) - concepts[SQUARES].null_count
    sizes = {name: len(part_to_bytes(table)) for name, table in tables.items()}
    # Written again without the squares: what a column takes in a compressed file can't be told from its numbers.
    of_concepts, plain = sizes.pop("concepts"), len(part_to_bytes(concepts.drop_columns(SQUARES)))
    return PartBytes(
        per_shard=sum(sizes.pop(name) for name in PER_NEURON),
        per_concept=plain / max(1, len(concepts)),
        per_repeated=(of_concepts - plain) / max(1, repeated),
        per_sample=sum(sizes.values()) / samples,
    )


def of_tables(neurons: int, groups: int, listed: float, concepts: float, samples: int) -> float:
    """Return the bytes of a run's tables and of its decoded neurons; `groups` and `listed` as above."""
    ranked = min(neurons, ORDERS * RANKED)
    per_neuron = NEURON_ROW + 2 * EXAMPLES * EXAMPLE_ROW + groups * ACTIVITY_ROW
    tables = concepts * ranked * RANKING + neurons * per_neuron + samples * (listed * LISTED + CAPTION)
    return COPIES * tables + neurons * DECODED


def expected_concepts(seen: Counter[str], occurrences: float) -> float:
    """Return how many different concepts so many occurrences have, given how often each was seen in a sample of them.

    For fewer occurrences than were seen by rarefaction; for more by the extrapolation of Colwell et al. 2012 ("Models
    and estimators linking individual-based and sample-based rarefaction, extrapolation and comparison of
    assemblages"), with the estimate of Chao for the concepts that were not seen. Far beyond what was seen it is a
    lower bound.
    """
    total = seen.total()
    if not total:
        return 0.0
    if occurrences <= total:
        return sum(1 - (1 - occurrences / total) ** count for count in seen.values())
    once, twice = (sum(count == often for count in seen.values()) for often in (1, 2))
    unseen = (total - 1) / total * once * (once - 1) / (2 * (twice + 1))
    # Every concept was seen more than once, so that none is expected that was not seen.
    if not unseen:
        return float(len(seen))
    return float(len(seen) + unseen * (1 - (1 - once / (total * unseen + once)) ** (occurrences - total)))


def expected_repeated(seen: Counter[str], occurrences: float) -> float:
    """Return how many concepts occur more than once in so many occurrences.

    By the estimate of Good and Turing: the next occurrence is of a new concept with the frequency of those that occur
    once.
    """
    now = expected_concepts(seen, occurrences)
    return max(0.0, now - occurrences * (expected_concepts(seen, occurrences + 1) - now))
