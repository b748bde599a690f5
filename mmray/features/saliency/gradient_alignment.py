"""Gradients of many boxes at once: batched vector-Jacobian products of a detector, reduced to cosines as they come."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.detector.detection import Detector
from mmray.features.saliency.maps import cosines

Outputs: TypeAlias = Literal["class", "boxes", "any"]
"""Of each box: its logit for the query, its four coordinates, or all five."""

CACHED, HELD = 2**18, 2**26
"""Entries of the gradients that are made at once: 1 MB on a processor, whose cache they fit, 256 MB on a GPU."""


def box_cosines(
    detector: Detector,
    seen: Float[Tensor, "patch width"],
    query: Float[Tensor, "1 dim"],
    gradient: Float[Tensor, "patch width"],
    outputs: Outputs,
    skipped: int = 0,
) -> tuple[Float[Tensor, "box output"], Float[Tensor, "box 4"]]:
    """Return the cosine of a gradient with those of every box's outputs, and the boxes.

    The first `skipped` places of the embedding (CLS), which the language model does not see, are not in the gradients
    that are compared.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = seen.detach().clone().float().requires_grad_()
        found = detector(leaf[None], query.detach().clone())
        parts = {"class": [found.logits[0]], "boxes": [found.boxes[0]], "any": [found.logits[0], found.boxes[0]]}
        every = torch.cat(parts[outputs], dim=1).flatten()
        each = max(1, (CACHED if leaf.device.type == "cpu" else HELD) // leaf.numel())
        aligned = []
        for start in range(0, len(every), each):
            wanted = every[start : start + each]
            (jacobian,) = torch.autograd.grad(
                wanted, leaf, torch.eye(len(wanted), device=leaf.device), retain_graph=True, is_grads_batched=True
            )
            aligned.append(cosines(gradient, jacobian[:, skipped:]))
    return torch.cat(aligned).reshape(len(found.boxes[0]), -1), found.boxes[0].detach()
