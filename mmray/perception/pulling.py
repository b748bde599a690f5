"""Gradients of many boxes at once: batched vector-Jacobian products of a detector, reduced to cosines as they come."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.perception.detection import Detector
from mmray.perception.saliency import cosines

AT_ONCE = 2**26
"""Entries of the gradients that are held at once."""


def box_cosines(
    detector: Detector,
    seen: Float[Tensor, "patch width"],
    query: Float[Tensor, "1 dim"],
    gradient: Float[Tensor, "patch width"],
    *,
    skipped: int = 0,
    corners: bool = False,
) -> tuple[Float[Tensor, "box output"], Float[Tensor, "box 4"], Float[Tensor, " box"]]:
    """Return the cosine of a gradient with that of every box's logit for the query; the boxes; their logits.

    `corners`: with those of the box's coordinates instead, four a box. The first `skipped` places of the embedding
    (CLS), which the language model does not see, are not in the gradients that are compared.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = seen.detach().clone().float().requires_grad_()
        found = detector(leaf[None], query.detach().clone())
        outputs = (found.boxes[0] if corners else found.logits[0]).flatten()
        each = max(1, AT_ONCE // leaf.numel())
        parts = []
        for start in range(0, len(outputs), each):
            wanted = outputs[start : start + each]
            (jacobian,) = torch.autograd.grad(
                wanted, leaf, torch.eye(len(wanted), device=leaf.device), retain_graph=True, is_grads_batched=True
            )
            parts.append(cosines(gradient, jacobian[:, skipped:]))
    return torch.cat(parts).reshape(len(found.boxes[0]), -1), found.boxes[0].detach(), found.logits[0, :, 0].detach()
