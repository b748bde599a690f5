"""Find the MLPs of one block, by which Linear feeds which elementwise."""

from __future__ import annotations

import torch
from torch import Tensor

from mmray.models.linear import is_linear
from mmray.models.recorded_calls import Block, Call, rerun


def fed_linears(block: Block) -> list[tuple[Call, list[Call]]]:
    """Return each Linear that passes the entry test and has the block's width, with the Linears that feed it."""
    # Gated attention passes the test too.
    linears = [
        call
        for call in block.inside
        if is_linear(call.module) and call not in block.silent_alone and not block.is_mixing(call)
    ]
    fed: list[tuple[Call, list[Call]]] = []
    for call in linears:
        width = call.first_input().shape[-1]
        if call.output.shape[-1] == block.total.shape[-1]:
            # One right after another is no MLP.
            others = [one for one in linears if one is not call and not torch.equal(one.output, call.first_input())]
            wide = [other for other in others if other.output.shape[-1] in (width, 2 * width)]
            if entries := [entry for entry in wide if feeds(block, entry, call)]:
                fed.append((call, entries))
    return fed


def gate_of(block: Block, entries: list[Call], call: Call) -> tuple[str | None, bool]:
    """Return the path of the gate's Linear (None for a plain MLP) and whether it computes the other factor too."""
    width = call.first_input().shape[-1]
    if len(entries) == 1 and entries[0].output.shape[-1] == width:
        return None, False
    for entry in entries:
        # Negating a linear factor negates the product; negating the gate, before its non-linearity, does not.
        def negate(output: Tensor) -> Tensor:
            return torch.cat((-output[..., :width], output[..., width:]), dim=-1)

        seen = rerun(block.call, entry, negate, call)[1]
        if seen is None or not torch.allclose(seen, -call.first_input()):
            return entry.path, entry.output.shape[-1] != width
    return None, False


def feeds(block: Block, entry: Call, call: Call) -> bool:
    """Return whether the entry's output reaches the projection's input elementwise: the entry test."""
    given = call.first_input()
    # A norm in between mixes the units of a token.
    between = next((one for one in block.inside if one.is_norm and torch.equal(one.output, given)), call)
    before, width = between.first_input(), given.shape[-1]
    # Every other unit, so that mixing with a neighbour shows.
    units = torch.arange(0, width, 2)

    def change(output: Tensor) -> Tensor:
        rows = output.clone().flatten(0, -2)
        rows[0, units] += 1 + rows[0, units].abs()
        return rows.view(output.shape)

    seen = rerun(block.call, entry, change, between)[1]
    if seen is None or seen.shape != before.shape:
        return False
    changed = (seen != before).flatten(0, -2)
    elsewhere = changed.clone()
    elsewhere[0, units] = False
    return bool(changed.any()) and not bool(elsewhere.any())
