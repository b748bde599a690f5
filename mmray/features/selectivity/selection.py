"""Choose each label's neurons from sums, and compare with the choices from shuffled labels and redrawn samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from mmray.features.selectivity import contrast, lape
from mmray.features.selectivity.lape import Chosen
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.runs.tables import vectors

QUANTITY = {"lape": "active", "contribution": "contribution"}
"""Method → quantity that it chooses by."""


def number_of(quantity: str) -> type[np.int32 | np.float64]:
    """Return the number format that sums of a quantity are committed in. Counts are exact in half the bytes."""
    return np.int32 if quantity == "active" else np.float64


@dataclass(frozen=True)
class Totals:
    """One quantity, summed over all samples."""

    sums: Float64[Tensor, "replicate neuron label"]
    tokens: Float64[Tensor, "replicate label"]


@dataclass(frozen=True)
class LabelSelection:
    """The neurons of each label, and the controls of their choice."""

    chosen: Chosen
    amount: Float64[Tensor, "neuron label"]
    """Mean over the label's tokens: the probability to be active, or the contribution in logits."""
    magnitude_entropy: Float64[Tensor, " neuron"]
    tokens: Float64[Tensor, " label"]
    cut: Float64[Tensor, " label"]
    """Score of the last neuron chosen: for lape over all labels, for contribution per label."""
    p_value: Float64[Tensor, " neuron"] | None
    """Fraction of permutations, the data itself included, in which the neuron's score is as good."""
    chance: Float64[Tensor, " label"] | None
    """Neurons that reach the cut with shuffled labels, mean over permutations."""
    stability: Float64[Tensor, "neuron label"] | None
    """Fraction of bootstrap draws that choose the neuron for the label."""
    overlap: Float64[Tensor, " label"] | None
    """Mean Jaccard index of the label's neurons with those of bootstrap draws."""
    shuffled: Chosen | None
    """Neurons chosen in the first permutation."""


def add_up(parts: Iterable[pa.Table], labels: tuple[str, ...]) -> dict[str, Totals]:
    """Return the totals of every quantity over the committed parts."""
    sums: dict[tuple[str, int, str], np.ndarray] = {}
    tokens: dict[tuple[str, int, str], int] = {}
    for part in parts:
        for quantity in part["quantity"].unique().to_pylist():
            rows = part.filter(pc.equal(part["quantity"], quantity))
            keys = zip(*(rows[name].to_pylist() for name in ("quantity", "replicate", "label")), strict=True)
            found = vectors(rows["values"], number_of(quantity))
            for key, count, values in zip(keys, rows["n_tokens"].to_pylist(), found, strict=True):
                tokens[key] = tokens.get(key, 0) + count
                # Counts are int32 per part; their total over parts may not fit.
                sums[key] = sums[key] + values if key in sums else values.astype(np.float64)
    totals = {}
    for quantity in sorted({key[0] for key in sums}):
        replicates = 1 + max(number for name, number, _ in sums if name == quantity)
        # Labels in the plan's order, so that their indices agree everywhere.
        keyed = [[(quantity, number, label) for label in labels] for number in range(replicates)]
        stacked = np.stack([np.stack([sums[key] for key in row], axis=1) for row in keyed])
        counts = np.array([[tokens[key] for key in row] for row in keyed], np.float64)
        totals[quantity] = Totals(torch.from_numpy(stacked), torch.from_numpy(counts))
    return totals


def totals_of_activity(rows: pa.Table, labels: tuple[str, ...], modality: str, neurons: int) -> dict[str, Totals]:
    """Return the totals of rows of the census's table `activity` for one module and kind of label, as one replicate."""
    by_label: dict[str, list[Tensor]] = {"n_active": [], "sum_squares": [], "n_tokens": []}
    for label in labels:
        own = rows.filter(pc.equal(rows["label"], label))
        for name, columns in by_label.items():
            counted = own.filter(pc.equal(own["modality"], modality))[name].to_numpy()
            columns.append(torch.from_numpy(counted.astype(np.float64) if len(counted) else np.zeros(neurons)))
    active, squares, tokens = (torch.stack(columns, dim=1)[None] for columns in by_label.values())
    return {"active": Totals(active, tokens[:, 0]), "squares": Totals(squares, tokens[:, 0])}


def select(totals: dict[str, Totals], settings: SelectivitySettings, permutations: int) -> LabelSelection:
    """Choose each label's neurons from every replicate; those of replicate 0 count, the others are controls."""
    by, squares = totals[QUANTITY[settings.method]], totals["squares"]
    chosen = [_choose(by.sums[number], by.tokens[number], settings) for number in range(len(by.sums))]
    scores = torch.stack([_scores(by.sums[number], by.tokens[number], settings) for number in range(1 + permutations)])
    lowest = settings.method == "lape"  # the best score is the lowest entropy, or the highest contrast
    cut = _cuts(chosen[0], lowest)
    shuffled, drawn = chosen[1 : 1 + permutations], chosen[1 + permutations :]
    mean_square = lape.probabilities(squares.sums[0], squares.tokens[0])
    member = _membership(chosen[0], by.sums.shape[1])
    redrawn = [_membership(other, by.sums.shape[1]) for other in drawn]
    as_good = scores[1:] <= scores[0] if lowest else scores[1:] >= scores[0]
    reaches_cut = scores[1:, :, None] <= cut if lowest else scores[1:, :, None] >= cut
    owners = [_owners(by.sums[1 + number], by.tokens[1 + number], settings) for number in range(permutations)]
    return LabelSelection(
        chosen=chosen[0],
        amount=lape.probabilities(by.sums[0], by.tokens[0]),
        magnitude_entropy=lape.entropies(mean_square.sqrt()),
        tokens=by.tokens[0],
        cut=cut,
        # The data counts as one permutation, so that a p-value is never 0.
        p_value=(1.0 + as_good.sum(dim=0).double()) / (1 + permutations) if permutations else None,
        chance=(reaches_cut & torch.stack(owners)).sum(dim=1).double().mean(dim=0) if permutations else None,
        stability=torch.stack(redrawn).double().mean(dim=0) if redrawn else None,
        overlap=torch.stack([_jaccard(member, other) for other in redrawn]).mean(dim=0) if redrawn else None,
        shuffled=shuffled[0] if shuffled else None,
    )


def _choose(sums: Tensor, tokens: Tensor, settings: SelectivitySettings) -> Chosen:
    if settings.method == "lape":
        return lape.choose(sums, tokens, settings.rate, settings.bar)
    return contrast.choose(lape.probabilities(sums, tokens), settings.rate)


def _scores(sums: Tensor, tokens: Tensor, settings: SelectivitySettings) -> Float64[Tensor, " neuron"]:
    amount = lape.probabilities(sums, tokens)
    if settings.method == "lape":
        return lape.filtered_entropies(amount, lape.bar_of(amount, settings.bar))
    return contrast.contrasts(amount).amax(dim=1)


def _cuts(chosen: Chosen, lowest: bool) -> Float64[Tensor, " label"]:
    """Return the score of the last neuron chosen, per label; NaN if there is none."""
    cuts = torch.full((chosen.member.shape[1],), torch.nan, dtype=torch.float64)
    for label in range(len(cuts)):
        # LAPE ranks neurons over all labels; contrast ranks them per label.
        own = chosen.member.any(dim=1) if lowest else chosen.member[:, label]
        if own.any():
            cuts[label] = chosen.score[own][-1]
    return cuts


def _owners(sums: Tensor, tokens: Tensor, settings: SelectivitySettings) -> Bool[Tensor, "neuron label"]:
    """Return the labels that each neuron would belong to if it were chosen."""
    amount = lape.probabilities(sums, tokens)
    if settings.method == "lape":
        return amount > lape.bar_of(amount, settings.bar)
    return contrast.contrasts(amount) > 0


def _membership(chosen: Chosen, neurons: int) -> Bool[Tensor, "neuron label"]:
    """Return the labels of every neuron, chosen or not."""
    member = torch.zeros(neurons, chosen.member.shape[1], dtype=torch.bool)
    member[chosen.neurons] = chosen.member
    return member


def _jaccard(one: Bool[Tensor, "n l"], other: Bool[Tensor, "n l"]) -> Float[Tensor, " l"]:
    """Return the Jaccard index per label; two empty sets are equal."""
    either = (one | other).sum(dim=0)
    return torch.where(either > 0, (one & other).sum(dim=0) / either.clamp(min=1), 1.0).double()
