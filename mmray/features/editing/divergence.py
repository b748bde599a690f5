"""The network's activations where a new answer departs from what the model says, and the neurons that matter there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas, Neuron
from mmray.features.editing.resumed_forward import batched, resume
from mmray.models.loading import LoadedModel
from mmray.models.norms import lens
from mmray.models.parts import output_rows


@torch.no_grad()
def divergence(model: LoadedModel, examples: Sequence[Example], layer: int) -> Float[Tensor, "answer unit"]:
    """Return a layer's activations at the position where each answer departs from what the model says."""
    return torch.cat([activation for activation, _ in _divergence_by_batch(model, examples, layer)])


@torch.no_grad()
def contrasting(
    model: LoadedModel, wrong: Sequence[Example], right: Sequence[Example], count: int, layers: Sequence[int]
) -> list[Neuron]:
    """Return the neurons that write a word where it is wrong, in contrast to where it is right.

    A neuron's part in the word is activation × ⟨row of W_out, unembedding of the model's token − that of the answer's⟩,
    in logits before the final norm, where the answer departs. Neurons are ranked by its mean over `wrong` minus
    max(0, its mean over `right`). The answers of `wrong` should be given; those of `right` should not.
    """
    parts: dict[int, Tensor] = {}
    for layer in layers:
        parts[layer] = _mean_part(model, wrong, layer)
        if right:
            # Clamped: a neuron that lowers the word where it is right is no better a target for that.
            parts[layer] = parts[layer] - _mean_part(model, right, layer).clamp(min=0)
    return highest(parts, count)


def highest(values: dict[int, Float[Tensor, " unit"]], count: int) -> list[Neuron]:
    """Return the neurons with the highest values of all layers, the highest first."""
    found: list[tuple[float, int, int]] = []
    for layer, row in values.items():
        # A layer can't place more than `count` neurons among the best, so the rest need no sorting.
        best = row.topk(min(count, len(row)))
        found += [(float(value), layer, int(unit)) for value, unit in zip(best.values, best.indices, strict=True)]
    return [(layer, unit) for _, layer, unit in sorted(found, reverse=True)[:count]]


def _mean_part(model: LoadedModel, examples: Sequence[Example], layer: int) -> Float[Tensor, " unit"]:
    rows = output_rows(model.network, model.projections[layer])
    unembedding = lens(model)
    total, count = torch.zeros(len(rows)), 0
    for activation, pairs in _divergence_by_batch(model, examples, layer):
        rejected, wanted = torch.tensor(pairs, device=unembedding.device).T
        direction = (unembedding[rejected] - unembedding[wanted]).float().to(rows.device)
        # On the CPU, because layers may be on several devices.
        total += (activation.to(rows.device) * (direction @ rows.float().T)).sum(dim=0).cpu()
        count += len(pairs)
    return total / max(count, 1)


def _divergence_by_batch(
    model: LoadedModel, examples: Sequence[Example], layer: int
) -> list[tuple[Tensor, list[tuple[int, int]]]]:
    """Return, per batch, the activations where answers depart, and the model's token and the answer's there."""
    found = []
    # Nothing is learned with these: they only say whose activations a resumed forward keeps.
    all_units = Deltas(model, [(layer, unit) for unit in range(model.widths[layer])])
    for batch, rows in batched(model, [example for example in examples if example.rejected]):
        part = resume(model, batch, all_units)
        # With later blocks, activations are of whole sequences; without, of the answers' positions alone.
        activation = part.activation if part.positions is None else part.activation.flatten(0, -2)[part.positions]
        lengths = torch.bincount(part.rows)
        # Positions follow one another answer by answer: each starts after all tokens of those before it.
        starts = (lengths.cumsum(0) - lengths).tolist()
        divergences = [
            (start + example.rejected[0], example.rejected[1], example.tokens[example.rejected[0]])
            for start, example in zip(starts, rows, strict=True)
            if example.rejected
        ]
        positions = [position for position, _, _ in divergences]
        found.append((activation[positions], [(rejected, wanted) for _, rejected, wanted in divergences]))
    return found
