"""The highest of many numbers, in about a single pass over them."""

from __future__ import annotations

from math import isqrt

import torch
from jaxtyping import Float, Int64
from torch import Tensor

WORTH_IT = 4
"""Numbers of a group for which a look at the groups' maxima pays."""


def top(
    values: Float[Tensor, "row column"], count: int
) -> tuple[Float[Tensor, "row highest"], Int64[Tensor, "row highest"]]:
    """Return each row's `count` highest values, highest first, and their columns, as `topk` does: ties in any order."""
    columns = values.shape[1]
    size = isqrt(columns // count)
    if size < WORTH_IT:
        found = values.topk(count, dim=1)
        return found.values, found.indices
    # As many groups of columns as are asked for have a maximum that is not below the lowest value of the result, and
    # what the other groups hold is not above it. Members of a group are `groups` columns apart, for a fast maximum.
    groups = columns // size
    whole = size * groups
    best = values[:, :whole].reshape(-1, size, groups).amax(1).topk(count, dim=1, sorted=False).indices
    members = (best[:, None] + torch.arange(0, whole, groups, device=best.device)[:, None]).flatten(1)
    rest = torch.arange(whole, columns, device=best.device).expand(len(values), -1)
    candidates = torch.cat([members, rest], dim=1)
    found = values.gather(1, candidates).topk(count, dim=1)
    return found.values, candidates.gather(1, found.indices)
