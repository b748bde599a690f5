"""Neurons of experts: those of the fused, routed ones, and of one that every token goes through, if there is one.

No Linear's input shows the neurons of fused experts, so they are recomputed from the experts' inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmray.models.layout import Projection
from mmray.models.linear import is_dense, is_quantised

Change: TypeAlias = Callable[[Float[Tensor, "token unit"]], Float[Tensor, "token unit"]]
Found: TypeAlias = tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"]]
"""Activations and gates of one forward."""
INPUTS = ("hidden_states", "top_k_index", "top_k_weights")
"""Inputs of the forward of transformers' fused experts, in this order; GPT-OSS names them otherwise."""


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer.

    A neuron is numbered expert * units + unit; those of the shared expert come last. Its activation includes all
    factors between it and the row of W_out: an expert's routing weight, or the weight of the shared expert.
    Activations are dense: 100 MB for 256 tokens of Qwen3-VL-30B's 98,304 neurons per layer.
    """

    module: nn.Module
    """Its output is what all of them write."""
    routed: nn.Module
    """The fused experts; of ERNIE-4.5-VL those of text, as its experts of images write nothing at a text's tokens."""
    scale: float
    """Factor on what these write."""
    shared: nn.Module | None
    """The Linear that is the output projection of the shared expert."""
    gate: nn.Module | None
    """Of the shared expert."""
    weight: nn.Module | None
    """The sigmoid of its one output is the weight of the shared expert; None: 1."""

    @classmethod
    def of(cls, network: nn.Module, projection: Projection) -> Experts:
        """Return the experts of a projection."""
        module = network.get_submodule(projection.path)
        routed = next(each for each in module.modules() if is_fused(each))
        paths = (projection.shared, projection.gate, projection.shared_weight)
        shared, gate, weight = (network.get_submodule(path) if path else None for path in paths)
        return cls(module, routed, projection.routed_scale, shared, gate, weight)

    @property
    def are_dense(self) -> bool:
        """Whether weights are plain numbers, which can be read and written."""
        return is_dense(self.routed.down_proj) and (self.shared is None or not is_quantised(self.shared))

    def rows(self, units: Int[Tensor, " unit"] | None = None) -> Float[Tensor, "unit hidden"]:
        """Return a copy of these neurons' rows of W_out; None: of all."""
        weight = by_unit(self.routed)
        if units is None:
            routed = weight.reshape(-1, weight.shape[-1])
            return routed if self.shared is None else torch.cat([routed, self._shared_rows().to(routed.device)])
        # The whole weight is never unfolded.
        own, others = self._split(units)
        rows = weight.new_empty(len(units), weight.shape[-1])
        rows[own] = weight[self._expert_and_unit(units[own])]
        if self.shared is not None:
            rows[others] = self._shared_rows()[self._of_shared(units[others])].to(rows.device)
        return rows

    @torch.no_grad()
    def set_rows(self, units: Int[Tensor, " unit"], rows: Float[Tensor, "unit hidden"]) -> None:
        """Write these neurons' rows of W_out in place."""
        own, others = self._split(units)
        by_unit(self.routed)[self._expert_and_unit(units[own])] = rows[own]
        if self.shared is not None:
            weight = self._shared_rows()
            weight[self._of_shared(units[others])] = rows[others].to(weight.device)

    @contextmanager
    def captured(self, receive: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Call `receive` with the activations and gates at each forward."""

        def capture(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
            activation, gate = take()
            receive(_changed(self.module, activation), gate)

        with self._recorded() as take, self.module.register_forward_hook(capture):
            yield

    @contextmanager
    def captured_biases(self, receive: Callable[[Float[Tensor, "token hidden"] | float], None]) -> Iterator[None]:
        """Call `receive` at each forward with what is written whatever the activations: biases times their weights."""
        found: list[Tensor | float] = []
        weight: list[Tensor] = []

        def keep_routed(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], __: Tensor) -> None:
            inputs = _inputs(self.routed, arguments, named)
            bias = getattr(self.routed, "down_proj_bias", None)
            if bias is not None:
                chosen, weights = inputs["top_k_index"], inputs["top_k_weights"]
                found.append((weights[..., None] * bias[chosen]).sum(dim=-2) * self.scale)

        def keep_weight(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            weight.append(output.flatten(0, -2).sigmoid())

        def collect(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
            bias = None if self.shared is None else getattr(self.shared, "bias", None)
            if bias is not None:
                found.append(bias * weight[0] if weight else bias)
            receive(sum(found))
            found.clear()
            weight.clear()

        with ExitStack() as stack:
            stack.enter_context(self.routed.register_forward_hook(keep_routed, with_kwargs=True))
            if self.weight is not None:
                stack.enter_context(self.weight.register_forward_hook(keep_weight))
            stack.enter_context(self.module.register_forward_hook(collect))
            yield

    @contextmanager
    def changed(self, units: Int[Tensor, " unit"], change: Change) -> Iterator[None]:
        """Make the experts write as if `change` had been applied to these neurons' activations.

        `change` maps activations (token, unit). It sees zeros where a token is not routed to the neuron's expert, and
        its result for them is written too. Nested changes apply in order; activations read meanwhile are the changed
        ones.
        """
        active = _CHANGED.get(self.module) or _CHANGED.setdefault(self.module, _Changes(self))
        key = object()
        active.changes[key] = units, change
        try:
            yield
        finally:
            del active.changes[key]
            if not active.changes:
                active.hooks.close()
                del _CHANGED[self.module]

    @contextmanager
    def added(self, write: Callable[[Float[Tensor, "token neuron"]], Float[Tensor, "token hidden"]]) -> Iterator[None]:
        """Add to the experts' output what `write` makes of their activations."""

        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return _plus(output, write(_changed(self.module, take()[0])))

        with self._recorded() as take, self.module.register_forward_hook(add):
            yield

    def gate_function(self) -> Callable[[Tensor], Tensor] | None:
        """Return the non-linearity after the gates; None if they are not plain, or not all the same."""
        function: Any = getattr(self.routed, "act_fn", None)
        if not callable(function) or not has_plain_gate(self.routed):
            return None
        if self.shared is None:
            return function  # type: ignore[no-any-return]
        return function if self.gate is not None and self._gates_alike(function) else None

    def _gates_alike(self, function: Callable[[Tensor], Tensor]) -> bool:
        # Tried on numbers instead of read from names.
        numbers = torch.linspace(-4, 4, 33)
        owner = next(each for each in self.module.modules() if any(child is self.gate for child in each.children()))
        others = (getattr(owner, name, None) for name in ("act_fn", "act", "activation_fn"))
        return any(callable(other) and torch.equal(other(numbers), function(numbers)) for other in others)

    @contextmanager
    def _recorded(self) -> Iterator[Callable[[], Found]]:
        """Yield a function for forward hooks of `module`, which returns what was computed in this forward.

        Works with all of transformers' implementations (eager, batched, grouped), because only inputs are read.
        """
        routed: list[tuple[Tensor, Tensor | None]] = []
        shared: dict[str, Tensor] = {}
        # Of the experts' own tokens among all; None: all are.
        own_tokens: list[Tensor | None] = []

        def keep_types(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            own_tokens.append(_text_tokens([*arguments, *named.values()]))

        def keep_routed(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], __: Tensor) -> None:
            inputs = _inputs(self.routed, arguments, named)
            if is_grouped(self.routed):
                routed.append(_grouped(self.routed, inputs["hidden_states"]))
            else:
                routed.append(_routed(self.routed, **{name: inputs[name] for name in INPUTS}))

        def keep(name: str, tensor: Tensor) -> None:
            shared[name] = tensor.flatten(0, -2)

        def take() -> Found:
            activation, gate = routed.pop()
            activation = activation if self.scale == 1 else activation * self.scale
            gate = activation if gate is None else gate
            if (own_token := own_tokens.pop()) is not None:
                activation, gate = (_spread(values, own_token) for values in (activation, gate))
            if self.shared is None:
                return activation, gate
            own = shared.pop("activation")
            # A fused Linear computes the other factor too; the gate comes first.
            own_gate = shared.pop("gate", own)[:, : own.shape[1]]
            if self.weight is not None:
                own = own * shared.pop("weight").sigmoid()
            pairs = (activation, own), (gate, own_gate)
            whole, gates = (torch.cat([one, other.to(one)], dim=1) for one, other in pairs)
            return whole, gates

        with ExitStack() as stack:
            stack.enter_context(self.module.register_forward_pre_hook(keep_types, with_kwargs=True))
            stack.enter_context(self.routed.register_forward_hook(keep_routed, with_kwargs=True))
            if self.shared is not None:
                stack.enter_context(
                    self.shared.register_forward_pre_hook(lambda _, arguments: keep("activation", arguments[0]))
                )
            for name, module in (("gate", self.gate), ("weight", self.weight)):
                if module is not None:
                    stack.enter_context(module.register_forward_hook(partial(_output_of, partial(keep, name))))
            yield take

    def _split(self, units: Int[Tensor, " unit"]) -> tuple[Tensor, Tensor]:
        """Return which of these neurons are of routed experts, and which of the shared one."""
        experts, each, _ = by_unit(self.routed).shape
        own = units < experts * each
        return own, ~own

    def _expert_and_unit(self, units: Int[Tensor, " unit"]) -> tuple[Tensor, Tensor]:
        """Return each neuron's expert, and its unit within the expert."""
        weight = by_unit(self.routed)
        units = units.to(weight.device)
        return units // weight.shape[1], units % weight.shape[1]

    def _of_shared(self, units: Int[Tensor, " unit"]) -> Tensor:
        """Return the shared expert's units of these neurons."""
        experts, each, _ = by_unit(self.routed).shape
        return (units - experts * each).to(self._shared_rows().device)

    def _shared_rows(self) -> Float[Tensor, "unit hidden"]:
        """Return a view of the shared expert's rows of W_out."""
        assert self.shared is not None
        return self.shared.get_parameter("weight").T


class _Changes:
    """The active changes of a layer's neurons, in order, and the one hook that applies them all."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.changes: dict[object, tuple[Int[Tensor, " unit"], Change]] = {}
        self.hooks = ExitStack()
        take = self.hooks.enter_context(experts._recorded())

        def apply(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
            before = take()[0]
            index = torch.unique(torch.cat([units for units, _ in self.changes.values()])).to(before.device)
            # The output is linear in the activations: adding the difference avoids running the experts again.
            return _plus(output, (_changed(module, before) - before)[:, index] @ experts.rows(index))

        self.hooks.enter_context(experts.module.register_forward_hook(apply))


_CHANGED: WeakKeyDictionary[nn.Module, _Changes] = WeakKeyDictionary()


def _changed(module: nn.Module, activation: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
    """Return the activations with the active changes; the same tensor if there are none."""
    if module not in _CHANGED:
        return activation
    changed = activation.clone()
    for units, change in _CHANGED[module].changes.values():
        index = units.to(changed.device)
        changed[:, index] = change(changed[:, index])
    return changed


def _text_tokens(inputs: list[Any]) -> Bool[Tensor, " token"] | None:
    """Return which tokens are of type 0, if a module is told the type of each and there are others."""
    states, *others = [value for value in inputs if isinstance(value, Tensor)]
    for types in others:
        if not types.is_floating_point() and types.shape == states.shape[:-1] and types.any():
            return types.flatten() == 0
    return None


def _spread(values: Float[Tensor, "own_token neuron"], own: Bool[Tensor, " token"]) -> Float[Tensor, "token neuron"]:
    """Return values of some tokens among zeros for the others."""
    spread = values.new_zeros(len(own), values.shape[1])
    spread[own.to(values.device)] = values
    return spread


def _plus(output: Any, added: Float[Tensor, "token hidden"]) -> Any:
    if isinstance(output, tuple):
        return _plus(output[0], added), *output[1:]
    return output + added.to(output).view(output.shape)


def _output_of(keep: Callable[[Tensor], None], _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
    keep(output)


def routed_experts(network: nn.Module, projection: Projection) -> tuple[int, int] | None:
    """Return a layer's number of routed experts, and the units of each; None for an ordinary MLP."""
    if not projection.experts:
        return None
    experts, units, _ = by_unit(Experts.of(network, projection).routed).shape
    return experts, units


def is_fused(module: nn.Module) -> bool:
    """Return whether a module is one of transformers' fused experts, with one weight for all output projections."""
    weight = getattr(module, "down_proj", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 3:
        return False
    names = inspect.signature(module.forward).parameters
    # Those that transformers can run in several ways compute their gates in a function of their own.
    return is_grouped(module) or set(INPUTS) <= names.keys() or (len(names) == 3 and hasattr(module, "_apply_gate"))


def _inputs(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a call of fused experts by the names in INPUTS."""
    if is_grouped(module):
        return {INPUTS[0]: arguments[0] if arguments else named[INPUTS[0]]}
    own = tuple(inspect.signature(module.forward).parameters)
    given = dict(zip(own, arguments, strict=False)) | named
    return {name: given[one] for name, one in zip(INPUTS, own, strict=True)}


def is_grouped(module: nn.Module) -> bool:
    """Return whether fused experts get the tokens once per expert, scaled by the router (Llama 4)."""
    return tuple(inspect.signature(module.forward).parameters) == INPUTS[:1]


def written_by(module: nn.Module, output: Float[Tensor, "row hidden"]) -> Float[Tensor, "token hidden"]:
    """Return what fused experts write together, given their output."""
    return output.view(len(by_unit(module)), -1, output.shape[-1]).sum(0) if is_grouped(module) else output


def by_unit(module: Any) -> Float[Tensor, "expert unit hidden"]:
    """Return a view of the output projections' weight, indexed by neuron: [expert, unit]."""
    # GPT-OSS and others store the transpose of a Linear's weight.
    weight: Tensor = module.down_proj
    return weight if getattr(module, "is_transposed", False) or is_grouped(module) else weight.transpose(1, 2)


def _grouped(
    module: Any, hidden_states: Float[Tensor, "expert_and_token hidden"]
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"]]:
    """Return the activations and gates of experts that get every token; of those not routed to them, zeros."""
    entered = torch.bmm(hidden_states.view(len(module.gate_up_proj), -1, hidden_states.shape[-1]), module.gate_up_proj)
    gate, factor = entered.chunk(2, dim=-1)
    activation = factor * module.act_fn(gate)
    by_token, gates = (values.transpose(0, 1).flatten(1) for values in (activation, gate))
    return by_token, gates


def _routed(
    module: Any,
    hidden_states: Float[Tensor, "token hidden"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"] | None]:
    """Return the activations as the experts compute them, and their gates; None without plain gates."""
    down = module.down_proj
    transposed = getattr(module, "is_transposed", False)
    experts, units, _ = by_unit(module).shape
    has_gate = getattr(module, "has_gate", True)
    entry = module.gate_up_proj if has_gate else module.up_proj
    bias = getattr(module, "gate_up_proj_bias" if has_gate else "up_proj_bias", None)
    hidden, chosen, weights = (given.to(down.device) for given in (hidden_states, top_k_index, top_k_weights))
    activation = hidden.new_zeros(hidden.shape[0], experts, units)
    gate = torch.zeros_like(activation) if has_plain_gate(module) else None
    # Expert-parallel models mark an expert on another device by an id past the last expert.
    for expert in torch.unique(chosen[chosen < experts]).tolist():
        token, choice = torch.where(chosen == expert)
        matrix = entry[expert].T if transposed else entry[expert]
        # Only the tokens routed to this expert, as in the experts' own forward.
        entered = functional.linear(hidden[token], matrix, None if bias is None else bias[expert])
        passed = module._apply_gate(entered) if has_gate else module.act_fn(entered)
        activation[token, expert] = passed * weights[token, choice, None].to(passed.dtype)
        if gate is not None:
            gate[token, expert] = entered[:, :units]
    return activation.flatten(1), None if gate is None else gate.flatten(1)


def has_plain_gate(module: Any) -> bool:
    """Return whether the experts compute act_fn(first half) · second half of their up projection."""
    # Tried on numbers instead of read from names: some experts clamp or interleave the halves.
    function = getattr(module, "act_fn", None)
    if not getattr(module, "has_gate", True) or not callable(function):
        return False
    if is_grouped(module):
        return True
    units = by_unit(module).shape[1]
    entered = torch.linspace(20.0, -20.0, 2 * units, dtype=module.down_proj.dtype, device=module.down_proj.device)
    gate, factor = entered.chunk(2)
    return torch.allclose(module._apply_gate(entered[None])[0], function(gate) * factor)
