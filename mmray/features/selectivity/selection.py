"""Sums by replicate and label → the neurons of each label, and what chance and other samples would have chosen."""

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
"""What each method chooses by."""


def number_of(quantity: str) -> type[np.int32 | np.float64]:
    """Return the number format that sums of a quantity are committed in: exact, and counts in half the bytes."""
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
    """Score of the last one chosen: by lape of all, by contribution of the label."""
    p_value: Float64[Tensor, " neuron"] | None
    """Of a neuron: in how many permutations, of all and the data, its score is as good."""
    chance: Float64[Tensor, " label"] | None
    """Neurons that reach the cut for each label where labels are shuffled: the mean over permutations."""
    stability: Float64[Tensor, "neuron label"] | None
    """In what part of the bootstrap draws the neuron is chosen for the label."""
    overlap: Float64[Tensor, " label"] | None
    """Mean Jaccard index of a label's neurons with those of the bootstrap draws."""
    shuffled: Chosen | None
    """What the method chooses where labels are shuffled once."""


def add_up(parts: Iterable[pa.Table], labels: tuple[str, ...]) -> dict[str, Totals]:
    """Return the totals of every quantity over the parts that units of work committed."""
    sums: dict[tuple[str, int, str], np.ndarray] = {}
    tokens: dict[tuple[str, int, str], int] = {}
    for part in parts:
        for quantity in part["quantity"].unique().to_pylist():
            rows = part.filter(pc.equal(part["quantity"], quantity))
            keys = zip(*(rows[name].to_pylist() for name in ("quantity", "replicate", "label")), strict=True)
            found = vectors(rows["values"], number_of(quantity))
            for key, count, values in zip(keys, rows["n_tokens"].to_pylist(), found, strict=True):
                tokens[key] = tokens.get(key, 0) + count
                sums[key] = sums[key] + values if key in sums else values.astype(np.float64)
    totals = {}
    for quantity in sorted({key[0] for key in sums}):
        replicates = 1 + max(number for name, number, _ in sums if name == quantity)
        keyed = [[(quantity, number, label) for label in labels] for number in range(replicates)]
        stacked = np.stack([np.stack([sums[key] for key in row], axis=1) for row in keyed])
        counts = np.array([[tokens[key] for key in row] for row in keyed], np.float64)
        totals[quantity] = Totals(torch.from_numpy(stacked), torch.from_numpy(counts))
    return totals


def of_activity(rows: pa.Table, labels: tuple[str, ...], modality: str, neurons: int) -> dict[str, Totals]:
    """Return the totals of a census's table `activity`, of one module and kind of label: the data as it is."""
    wanted = ("image", "text") if modality == "both" else (modality,)
    numbers: dict[str, list[Tensor]] = {"n_active": [], "sum_squares": [], "n_tokens": []}
    for label in labels:
        own = rows.filter(pc.equal(rows["label"], label))
        for name, columns in numbers.items():
            total = np.zeros(neurons)
            for part in wanted:
                counted = own.filter(pc.equal(own["modality"], part))[name].to_numpy()
                total += counted if len(counted) else 0.0
            columns.append(torch.from_numpy(total))
    active, squares, tokens = (torch.stack(columns, dim=1)[None] for columns in numbers.values())
    return {"active": Totals(active, tokens[:, 0]), "squares": Totals(squares, tokens[:, 0])}


def select(totals: dict[str, Totals], settings: SelectivitySettings, permutations: int) -> LabelSelection:
    """Choose each label's neurons, from the data as it is and from every replicate."""
    by, squares = totals[QUANTITY[settings.method]], totals["squares"]
    chosen = [_choose(by.sums[number], by.tokens[number], settings) for number in range(len(by.sums))]
    scores = torch.stack([_scores(by.sums[number], by.tokens[number], settings) for number in range(1 + permutations)])
    lowest = settings.method == "lape"
    cut = _cuts(chosen[0], lowest)
    shuffled, drawn = chosen[1 : 1 + permutations], chosen[1 + permutations :]
    mean_square = lape.probabilities(squares.sums[0], squares.tokens[0])
    member = _membership(chosen[0], by.sums.shape[1])
    again = [_membership(other, by.sums.shape[1]) for other in drawn]
    as_good = scores[1:] <= scores[0] if lowest else scores[1:] >= scores[0]
    beyond = scores[1:, :, None] <= cut if lowest else scores[1:, :, None] >= cut
    owned = [_owners(by.sums[1 + number], by.tokens[1 + number], settings) for number in range(permutations)]
    return LabelSelection(
        chosen=chosen[0],
        amount=lape.probabilities(by.sums[0], by.tokens[0]),
        magnitude_entropy=lape.entropies(mean_square.sqrt()),
        tokens=by.tokens[0],
        cut=cut,
        p_value=(1.0 + as_good.sum(dim=0).double()) / (1 + permutations) if permutations else None,
        chance=(beyond & torch.stack(owned)).sum(dim=1).double().mean(dim=0) if permutations else None,
        stability=torch.stack(again).double().mean(dim=0) if again else None,
        overlap=torch.stack([_jaccard(member, other) for other in again]).mean(dim=0) if again else None,
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
    """Return the score of the last neuron chosen, for each label; NaN where there is none."""
    cuts = torch.full((chosen.member.shape[1],), torch.nan, dtype=torch.float64)
    for label in range(len(cuts)):
        own = chosen.member.any(dim=1) if lowest else chosen.member[:, label]
        if own.any():
            cuts[label] = chosen.score[own][-1]
    return cuts


def _owners(sums: Tensor, tokens: Tensor, settings: SelectivitySettings) -> Bool[Tensor, "neuron label"]:
    """Tell which label each neuron would belong to if it were chosen."""
    amount = lape.probabilities(sums, tokens)
    if settings.method == "lape":
        return amount > lape.bar_of(amount, settings.bar)
    return contrast.contrasts(amount) > 0


def _membership(chosen: Chosen, neurons: int) -> Bool[Tensor, "neuron label"]:
    whole = torch.zeros(neurons, chosen.member.shape[1], dtype=torch.bool)
    whole[chosen.neurons] = chosen.member
    return whole


def _jaccard(one: Bool[Tensor, "n l"], other: Bool[Tensor, "n l"]) -> Float[Tensor, " l"]:
    either = (one | other).sum(dim=0)
    return torch.where(either > 0, (one & other).sum(dim=0) / either.clamp(min=1), 1.0).double()
