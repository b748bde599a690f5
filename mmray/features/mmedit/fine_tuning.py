"""The paper's fine-tuning baselines: all weights of one block, by the cross-entropy of the record's answer alone.

As in EasyEdit's FT: Adam with a rate of 5e-4, 25 steps at most, stopped below a loss of 0.01. The answer's end is
learned too, because a reply that goes on after the target is none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmray.errors import InputError
from mmray.features.editing.dataset import Example, batches
from mmray.features.mmedit.record_edits import PreparedRecord, Session
from mmray.models.blocks import block_of
from mmray.models.loading import LoadedModel

LEARNING_RATE, STEPS, ENOUGH = 5e-4, 25, 1e-2


@dataclass(frozen=True, eq=False)
class ParameterEdit:
    """New values of some parameters."""

    values: Mapping[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    purposes: tuple[Any, ...] = ()

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Give the parameters these values inside the block; afterwards they are byte-equal to before."""
        parameters = {name: model.network.get_parameter(name) for name in self.values}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _set(parameters, self.values)
        try:
            yield
        finally:
            _set(parameters, before)


def tune_last_block(session: Session, prepared: PreparedRecord, _: str) -> ParameterEdit:
    """Fine-tune the last block of the decoder."""
    model = session.model
    return fine_tune(model, block_of(model, len(model.widths) - 1), prepared.examples[0])


def tune_vision_block(session: Session, prepared: PreparedRecord, _: str) -> ParameterEdit:
    """Fine-tune the projector or, where there is one, all layers of the Q-Former."""
    return fine_tune(session.model, vision_block(session.model), prepared.examples[0])


def vision_block(model: LoadedModel) -> nn.Module:
    """Return what stands between the vision tower and the decoder; raises InputError if that is not known."""
    projections = model.parts.mlps("projector")
    if not projections:
        raise InputError(f"{model.name}: no projector with an MLP is known, so --methods ft-v has nothing to tune")
    path = projections[-1].path
    # Several numbered layers, as in a Q-Former, are one block; of a single MLP the module that holds it.
    numbered = re.match(r"(.*?)\.\d+\.", path)
    block: nn.Module = model.network.get_submodule(numbered.group(1) if numbered else path.rpartition(".")[0])
    return block


def fine_tune(model: LoadedModel, block: nn.Module, example: Example) -> ParameterEdit:
    """Return the values that the block's parameters get; the model is left as it was, to the byte."""
    began = time.perf_counter()
    # By identity: the block has its own names for them, and an edit needs those of the network.
    wanted = set(map(id, block.parameters()))
    parameters = {name: one for name, one in model.network.named_parameters() if id(one) in wanted}
    before = {name: one.detach().clone() for name, one in parameters.items()}
    # fp32 whatever the model's format: small steps would round away in half precision.
    masters = {name: one.float().clone() for name, one in before.items()}
    optimizer = torch.optim.Adam(masters.values(), lr=LEARNING_RATE)
    try:
        for parameter in parameters.values():
            parameter.requires_grad_()
        for _ in range(STEPS):
            loss = _loss(model, example)
            if loss.item() < ENOUGH:
                break
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                # Parameters that this input does not use have no gradient.
                masters[name].grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            _set(parameters, masters)
        values = {name: one.detach().clone() for name, one in parameters.items()}
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        _set(parameters, before)
    change = sum(float((values[name].float() - before[name].float()).square().sum()) for name in values)
    facts = {"parameters_changed": sum(one.numel() for one in values.values()), "norm": round(change**0.5, 4)}
    return ParameterEdit(values, facts | {"seconds": round(time.perf_counter() - began, 2)})


def _loss(model: LoadedModel, example: Example) -> Tensor:
    """Return the mean negative log-likelihood of the answer's tokens and its end, in nats."""
    (batch,) = batches(model, [example])
    with torch.enable_grad():
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits[0].float()
    # The logits at a position predict the next token, so an answer starts one position earlier.
    start = batch.caption_start[0] - 1
    targets = torch.tensor(example.tokens, device=logits.device)
    return functional.cross_entropy(logits[start : start + len(targets)], targets)


@torch.no_grad()
def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
