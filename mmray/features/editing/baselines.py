"""What edits are held against: other neurons, a whole MLP, a rank-one change, LoRA, and a ban at decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.errors import InputError
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas, Neuron, RankOne
from mmray.features.editing.divergence import divergence
from mmray.features.editing.edit import Purpose
from mmray.features.editing.resumed_forward import resume_all
from mmray.models.loading import LoadedModel

RANK = 8
"""Of the LoRA baseline."""
RIDGE = 1e-2
"""Added to the covariance's diagonal, in units of its mean: few places make it singular."""


def whole_layers(model: LoadedModel, layers: Sequence[int]) -> list[Neuron]:
    """Return every neuron of these layers; of the last one, fine-tuning its W_out is FT-L (Meng et al. 2022)."""
    return [(layer, unit) for layer in layers for unit in range(model.widths[layer])]


@torch.no_grad()
def most_active(model: LoadedModel, new: Sequence[Example], count: int, layers: Sequence[int]) -> list[Neuron]:
    """Return the neurons most active where the old word was to be predicted, the paper's baseline."""
    found: list[tuple[float, int, int]] = []
    for layer in layers:
        mean = divergence(model, new, layer).mean(dim=0)
        best = mean.topk(min(count, len(mean)))
        found += [(float(value), layer, int(unit)) for value, unit in zip(best.values, best.indices, strict=True)]
    return [(layer, unit) for _, layer, unit in sorted(found, reverse=True)[:count]]


@torch.no_grad()
def rank_one(model: LoadedModel, new: Sequence[Example], keep: Sequence[Example], layer: int) -> RankOne:
    """Return a rank-one change of one layer, as ROME's: u = C⁻¹k / kᵀC⁻¹k, v left to learn.

    k is the mean activation where the old word was to be predicted, C the second moment of activations at the kept
    answers' places. What was written at k changes by v, and as little as can be elsewhere. Raises InputError where
    there are no such answers.
    """
    if not keep:
        raise InputError("rank-one needs captions that are to stay; raise --kept, or analyse more samples")
    key = divergence(model, new, layer).mean(dim=0)
    seen = Deltas(model, whole_layers(model, [layer]))
    others = torch.cat([part.activation.flatten(0, -2) for part, _ in resume_all(model, keep, seen)])
    moment = others.T @ others / len(others)
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(key), device=key.device)
    direction = torch.linalg.solve(moment + ridge, key)
    return RankOne(model, layer, direction / (key @ direction), float(key.norm()))


class LowRank(Deltas):
    """A LoRA (Hu et al. 2022) of peft on a layer's output projection; `close` takes it out of the network again."""

    def __init__(self, model: LoadedModel, layer: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError("--method lora needs peft: pip install 'mmray[baselines]'") from error
        path = model.projections[layer].path
        if model.projections[layer].experts:
            raise InputError(f"{model.name}: --method lora needs a Linear, which fused experts are not")
        super().__init__(model, whole_layers(model, [layer]))
        self.path = path
        self.plain = model.network.get_submodule(path)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[path])
        inject_adapter_in_model(config, model.network)
        self.module: Any = model.network.get_submodule(path)
        a, b = (getattr(self.module, name)["default"].weight for name in ("lora_A", "lora_B"))
        self.learnt[layer] = [a.requires_grad_(), b.requires_grad_()]

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return what the adapter adds to W_out's rows."""
        a, b = self.learnt[layer]
        return (b.float() @ a.float()).T

    def close(self) -> None:
        """Put the plain projection back."""
        parent, _, name = self.path.rpartition(".")
        setattr(self.model.network.get_submodule(parent), name, self.plain)


@dataclass(frozen=True, eq=False)
class WordBan:
    """No edit: the word's tokens are forbidden while the model writes."""

    model: LoadedModel
    words: tuple[str, ...]
    purposes: tuple[Purpose, ...]
    facts: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "parameters_changed": 0})

    @property
    def purpose(self) -> Purpose:
        """The purpose."""
        return self.purposes[0]

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Forbid the words in all that the model generates while the block lasts; weights and logits stay."""
        settings: Any = model.network.generation_config
        before = settings.bad_words_ids
        settings.bad_words_ids = banned_tokens(model, self.words)
        try:
            yield
        finally:
            settings.bad_words_ids = before


def banned_tokens(model: LoadedModel, words: Sequence[str]) -> list[list[int]]:
    """Return the words' token ids, as they stand within a sentence and at its beginning."""
    spellings = [form for word in words for form in (f" {word}", word, f" {word}s")]
    found = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in spellings]
    return [list(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]
