"""Gradient alignment: the gradients of all boxes by batched vector-Jacobian products, reduced to cosines in chunks."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.detector.boxes import with_centres
from mmray.detector.detection import Detector
from mmray.features.saliency.maps import cosines

Outputs: TypeAlias = Literal["class", "boxes", "any"]
"""Outputs of each box: its logit for the query, its centre, width and height, or all five."""

CPU_ENTRIES, GPU_ENTRIES = 2**18, 2**26
"""Gradient entries per chunk: 1 MB on a CPU, to stay in its cache, and 256 MB on a GPU."""


def box_cosines(
    detector: Detector,
    features: Float[Tensor, "patch width"],
    query: Float[Tensor, "1 dim"],
    gradient: Float[Tensor, "patch width"],
    outputs: Outputs,
    skipped: int = 0,
) -> tuple[Float[Tensor, "box output"], Float[Tensor, "box 4"]]:
    """Return the cosine of a gradient with the gradient of every box's outputs, and the boxes.

    The first `skipped` positions of the features (CLS) are left out, because the language model does not see them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Cloned outside inference mode, because tensors made inside it can't be in a graph.
        leaf = features.detach().clone().float().requires_grad_()
        found = detector(leaf[None], query.detach().clone())
        # As published, the gradients of a box are those of its centre and not of its corner.
        places = with_centres(found.boxes[0])
        parts = {"class": [found.logits[0]], "boxes": [places], "any": [found.logits[0], places]}
        flat = torch.cat(parts[outputs], dim=1).flatten()
        chunk = max(1, (CPU_ENTRIES if leaf.device.type == "cpu" else GPU_ENTRIES) // leaf.numel())
        # All Jacobians at once would be outputs × patches × width; a chunk is reduced to cosines before the next.
        aligned = []
        for part in torch.split(flat, chunk):
            # A row of the identity per output. The graph is kept, because all chunks share one forward.
            (jacobian,) = torch.autograd.grad(
                part, leaf, torch.eye(len(part), device=leaf.device), retain_graph=True, is_grads_batched=True
            )
            aligned.append(cosines(gradient, jacobian[:, skipped:]))
    return torch.cat(aligned).reshape(len(found.boxes[0]), -1), found.boxes[0].detach()
