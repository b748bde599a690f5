"""One recorded forward of a model, module by module, and its blocks run again with one module's output changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.linear import is_linear

Change: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One module's call in the recorded forward."""

    path: str
    module: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor

    def inputs(self) -> list[Tensor]:
        """Return the tensors among the module's inputs."""
        return [value for value in (*self.arguments, *self.named.values()) if isinstance(value, Tensor)]

    def first_input(self) -> Tensor:
        """Return the first tensor among the module's inputs, its hidden states."""
        return self.inputs()[0]

    @property
    def is_norm(self) -> bool:
        """Whether the module has a factor per coordinate and keeps the shape."""
        weight = getattr(self.module, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() == 1 and self.first_input().shape == self.output.shape


@dataclass(frozen=True)
class Block:
    """One decoder block's call, and those of the modules inside it, in the order in which they ran."""

    call: Call
    inside: list[Call]

    @property
    def path(self) -> str:
        """Path of the block's module."""
        return self.call.path

    @cached_property
    def end(self) -> Call | None:
        """The norm that the block ends with, after all that it writes was added (BERT, BART)."""
        return next((one for one in self.inside if one.is_norm and torch.equal(one.output, self.call.output)), None)

    @property
    def total(self) -> Tensor:
        """The sum of the block's input and all that it writes."""
        return self.call.output if self.end is None else self.end.first_input()

    @cached_property
    def mixing(self) -> list[Call]:
        """The modules that mix tokens: attention, or what stands in its place."""
        return [one for one in self.inside if _mixes(one, self.total.numel())]

    def is_mixing(self, call: Call) -> bool:
        """Return whether a module is part of one that mixes tokens."""
        return any(f"{call.path}.".startswith(f"{one.path}.") for one in self.mixing)

    @cached_property
    def alone(self) -> Call:
        """The block's call with zeros for its tensors other than the hidden states (Gemma 4's per-layer inputs)."""
        hidden = self.call.first_input()

        def emptied(value: Any) -> Any:
            other = isinstance(value, Tensor) and value is not hidden and value.is_floating_point()
            return torch.zeros_like(value) if other and value.shape[:-1] == hidden.shape[:-1] else value

        arguments = tuple(emptied(value) for value in self.call.arguments)
        return Call(
            self.call.path,
            self.call.module,
            arguments,
            {name: emptied(value) for name, value in self.call.named.items()},
            self.call.output,
        )

    @cached_property
    def has_side_inputs(self) -> bool:
        """Whether the block has inputs per position other than the hidden states."""
        pairs = zip(
            (*self.call.arguments, *self.call.named.values()),
            (*self.alone.arguments, *self.alone.named.values()),
            strict=True,
        )
        return any(given is not emptied for given, emptied in pairs)

    @cached_property
    def silent_alone(self) -> list[Call]:
        """The modules that write nothing without the block's side inputs."""
        if not self.has_side_inputs:
            return []
        outputs: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for one in self.inside:
                stack.enter_context(_watched(one, outputs))
            _run(self.alone)
        silent = [
            one for one in self.inside if one.path in outputs and one.output.any() and not outputs[one.path].any()
        ]
        # Cross-attention, too, writes nothing without the encoder's states.
        return [one for one in silent if not self.is_mixing(one)]

    def total_with(self, altered: Call, change: Change, *, alone: bool = False) -> Tensor:
        """Return the sum with one module's output changed; `alone`: without the block's side inputs."""
        output, seen = rerun(self.alone if alone else self.call, altered, change, self.end)
        return output if seen is None else seen


def rerun(block: Call, altered: Call, change: Change, watched: Call | None) -> tuple[Tensor, Tensor | None]:
    """Run a block again with one module's output changed; return the block's output and the watched input."""
    seen: list[Tensor] = []

    def alter(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        # Some modules return more than their hidden states.
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].clone())

    with ExitStack() as stack:
        stack.enter_context(altered.module.register_forward_hook(alter))
        if watched is not None:
            stack.enter_context(watched.module.register_forward_pre_hook(watch))
        output = _run(block)
    return output, seen[-1] if seen else None


def record_calls(stack: ExitStack, path: str, module: nn.Module, calls: dict[str, Call]) -> None:
    """Record the module's last call, under its path."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Copied before the call: a block may add to its input in place.
        copies = {name: copied(value) for name, value in named.items()}
        inputs.append((tuple(copied(value) for value in arguments), copies))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        arguments, named = inputs.pop()
        if (tensor := first_tensor(output)) is not None:
            calls[path] = Call(path, module, arguments, named, tensor.clone())

    stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
    stack.enter_context(module.register_forward_hook(after))


def factor(given: Tensor, received: Tensor) -> float | None:
    """Return k if received = k * given up to the rounding of half precision; None if there is no k except 0."""
    if given.shape != received.shape:
        return None
    # In fp64, so that only the network's own rounding counts.
    given, received = given.double(), received.double()
    found = float((given * received).sum() / (given * given).sum().clamp_min(1e-30))
    error = float((received - found * given).norm() / received.norm().clamp_min(1e-30))
    if found == 0 or error > 1e-2:
        return None
    return 1.0 if abs(found - 1) < 1e-2 else found


def copied(value: Any) -> Any:
    """Return a copy of a tensor, and anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in a module's output, its hidden states."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _watched(call: Call, outputs: dict[str, Tensor]) -> Any:
    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if (tensor := first_tensor(output)) is not None:
            outputs[call.path] = tensor.clone()

    return call.module.register_forward_hook(keep)


def _run(block: Call) -> Tensor:
    """Run a block's call again and return its output."""
    named = {name: copied(value) for name, value in block.named.items()}
    output = first_tensor(block.module(*(copied(value) for value in block.arguments), **named))
    if output is None:
        raise InputError(f"{block.path}: its output is no tensor")
    return output


def _mixes(call: Call, size: int) -> bool:
    """Return whether what a module writes for the last token depends on what it gets for the others.

    That may be its own tokens or, in cross-attention, the encoder's.
    """
    given = call.first_input()
    sized = given.numel() == call.output.numel() == size and call.output.dim() > 1
    if not sized or is_linear(call.module):
        return False

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return copied(value)
        rows = value.clone().flatten(0, -2)
        rows[:-1] += 1 + rows[:-1].abs()
        return rows.view(value.shape)

    arguments, named = map(moved, call.arguments), {name: moved(value) for name, value in call.named.items()}
    again = first_tensor(call.module(*arguments, **named))
    if again is None:
        return False
    before, after = (output.flatten(0, -2)[-1].double() for output in (call.output, again))
    # Experts, too, give another result for a token grouped with others, but only by rounding.
    return float((after - before).norm()) > 3e-2 * float(before.norm())
