"""What the network holds where an answer that it is to give leaves what it would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas, Neuron
from mmray.features.editing.resumed_forward import batched, resume
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows, unembedding_rows


@torch.no_grad()
def divergence(model: LoadedModel, examples: Sequence[Example], layer: int) -> Float[Tensor, "answer unit"]:
    """Return a layer's activations at the place of each answer where it leaves what was said before."""
    return torch.cat([activation for activation, _ in _parts(model, examples, layer)])


@torch.no_grad()
def contrasting(
    model: LoadedModel, wrong: Sequence[Example], right: Sequence[Example], count: int, layers: Sequence[int]
) -> list[Neuron]:
    """Return the neurons that write a word where it is wrong, in contrast to where it is right.

    A neuron's part in what is said, where an answer leaves it, is activation × ⟨row of W_out, unembedding of the token
    said − that of the answer's⟩, in logits before the final norm. They are ordered by its mean over `wrong`, answers
    that ought to be given, less max(0, its mean over `right`), answers that ought not.
    """
    found: list[tuple[float, int, int]] = []
    for layer in layers:
        here = _mean_part(model, wrong, layer)
        if right:
            here = here - _mean_part(model, right, layer).clamp(min=0)
        best = here.topk(min(count, len(here)))
        found += [(float(value), layer, int(unit)) for value, unit in zip(best.values, best.indices, strict=True)]
    return [(layer, unit) for _, layer, unit in sorted(found, reverse=True)[:count]]


def _mean_part(model: LoadedModel, examples: Sequence[Example], layer: int) -> Float[Tensor, " unit"]:
    rows = output_rows(model.network, model.projections[layer])
    unembedding = unembedding_rows(model.network, model.parts)
    total, count = torch.zeros(len(rows)), 0
    for activation, pairs in _parts(model, examples, layer):
        said, wanted = torch.tensor(pairs, device=unembedding.device).T
        direction = (unembedding[said] - unembedding[wanted]).float().to(rows.device)
        total += (activation.to(rows.device) * (direction @ rows.float().T)).sum(dim=0).cpu()
        count += len(pairs)
    return total / max(count, 1)


def _parts(model: LoadedModel, examples: Sequence[Example], layer: int) -> list[tuple[Tensor, list[tuple[int, int]]]]:
    """Return, batch by batch, activations and the token said and the answer's, where an answer leaves what was said."""
    found = []
    seen = Deltas(model, [(layer, unit) for unit in range(model.widths[layer])])
    leaving = [example for example in examples if example.avoided]
    for batch, rows in batched(model, leaving):
        part = resume(model, batch, seen)
        activation = part.activation if part.places is None else part.activation.flatten(0, -2)[part.places]
        starts = (torch.bincount(part.rows).cumsum(0) - torch.bincount(part.rows)).tolist()
        left = [(start, example.tokens, example.avoided) for start, example in zip(starts, rows, strict=True)]
        places = [start + avoided[0] for start, _, avoided in left if avoided]
        pairs = [(avoided[1], tokens[avoided[0]]) for _, tokens, avoided in left if avoided]
        found.append((activation[places], pairs))
    return found
