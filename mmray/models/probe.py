"""Find the decoder's MLP output projections in a model of unknown type, by how they behave in one tiny forward.

No names are trusted. The final norm is the module whose output the unembedding receives. The decoder is the list of
blocks whose last output that norm receives. An output projection is a Linear of a block with more inputs than outputs
that passes two tests:

    entry     another Linear of the block feeds it elementwise: changing unit j of one token there changes unit j of
              that token here and nothing else, so neither attention nor other mixing lies between
    residual  what is added to its output is added to the block's output, unchanged or times a constant

Two entries make a gated MLP. The gate is the one in which the projection's input is not linear.

The block's output must be a sum of its input, the projection's output, and outputs of modules that mix tokens; each
times a constant. Otherwise the model is refused: contributions would leave out what some other part writes.

Where a block has fused experts, their output takes the projection's place; or the output of the module that adds to it
what one more MLP writes, times a weight: the expert that every token goes through.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.experts import by_unit, is_fused
from mmray.models.layout import ModelParts, Projection

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One module's call in the recorded forward."""

    path: str
    module: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor

    def first_input(self) -> Tensor:
        """Return the first tensor among the module's inputs."""
        return next(value for value in (*self.arguments, *self.named.values()) if isinstance(value, Tensor))


@torch.no_grad()
def probe(model: PreTrainedModel) -> ModelParts:
    """Find the language projections, the final norm and the unembedding, but not vision and projector.

    Runs four tokens of text through the language model once, then each block a few times. Raises InputError that
    says what was not found.
    """
    kind = model.config.model_type
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{kind}: no output embeddings, so no token to score neurons for")
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is None:
        raise InputError(f"{kind}: no image_token_id in its configuration, so how the image enters is unknown")
    # Dropout would make two runs differ.
    training = model.training
    model.eval()
    try:
        calls, encoder_decoder = _record(model, head)
        norm, logit_scale = _final_norm(kind, calls, head)
        blocks = _blocks(kind, model, calls, norm)
        projections = tuple(_projection(kind, layer, block, calls) for layer, block in enumerate(blocks))
    finally:
        model.train(training)
    return ModelParts(
        family="probed",
        projections=projections,
        final_norm=norm.path,
        unembedding=next(call.path for call in calls.values() if call.module is head),
        image="tokens",
        image_token_id=image_token_id,
        encoder_decoder=encoder_decoder,
        logit_scale=logit_scale,
        logit_cap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    )


def _record(model: PreTrainedModel, head: nn.Module) -> tuple[dict[str, Call], bool]:
    """Run four tokens of text; return every module's call by its path, and whether there is an encoder."""
    # Run the smallest model that contains the unembedding: BLIP-2 as a whole needs an image.
    head_path = next(path for path, module in model.named_modules() if module is head)
    owners = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    prefix, owner = max(
        (pair for pair in owners if not pair[0] or head_path.startswith(f"{pair[0]}.")), key=lambda pair: len(pair[0])
    )
    vocabulary = head.get_parameter("weight").shape[0]
    # Special tokens are at either end of most vocabularies.
    tokens = torch.tensor([[vocabulary // 2 + step for step in range(4)]], device=head.get_parameter("weight").device)
    # Some families raise for an image placeholder without an image.
    tokens[tokens == model.config.image_token_id] = vocabulary // 2 + 4
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    encoder_decoder = bool(getattr(owner.config, "is_encoder_decoder", False))
    if encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for path, module in owner.named_modules():
            _record_calls(stack, f"{prefix}.{path}".strip("."), module, calls)
        try:
            owner(**inputs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{model.config.model_type}: a forward of text alone failed ({reason})") from error
    return calls, encoder_decoder


def _record_calls(stack: ExitStack, path: str, module: nn.Module, calls: dict[str, Call]) -> None:
    """Record the module's last call."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Copied before the call: a block may add to its input in place.
        copies = {name: _copy(value) for name, value in named.items()}
        inputs.append((tuple(_copy(value) for value in arguments), copies))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        arguments, named = inputs.pop()
        if (tensor := _tensor(output)) is not None:
            calls[path] = Call(path, module, arguments, named, tensor.clone())

    stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
    stack.enter_context(module.register_forward_hook(after))


def _final_norm(kind: str, calls: dict[str, Call], head: nn.Module) -> tuple[Call, float]:
    """Return the norm whose output the unembedding received, and the factor between the two."""
    received = next(call for call in calls.values() if call.module is head).first_input()
    for call in reversed(calls.values()):
        weight = getattr(call.module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            factor = _factor(call.output, received)
            if factor is not None:
                return call, factor
    raise InputError(f"{kind}: no norm's output is what the unembedding receives")


def _blocks(kind: str, model: nn.Module, calls: dict[str, Call], norm: Call) -> list[Call]:
    """Return the calls of the decoder's blocks in order: the list whose last output the norm received."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # Outermost first: T5's blocks contain lists too, and the last one ends with the same output.
    for path, modules in sorted(lists, key=lambda pair: pair[0].count(".")):
        last = calls.get(f"{path}.{len(modules) - 1}")
        if last is None or _factor(last.output, norm.first_input()) is None:
            continue
        found = [calls.get(f"{path}.{index}") for index in range(len(modules))]
        ran = [call for call in found if call is not None]
        if len(ran) < len(found):
            raise InputError(f"{kind}: {path}.{found.index(None)} has no part in a forward of text alone")
        return ran
    raise InputError(f"{kind}: no list of blocks ends with what {norm.path} receives")


def _projection(kind: str, layer: int, block: Call, calls: dict[str, Call]) -> Projection:
    """Find the one MLP output projection of a block."""
    inside = [call for path, call in calls.items() if path.startswith(f"{block.path}.")]
    mixing = [call for call in inside if _mixes(block, call)]
    # Gated attention passes both tests too.
    linears = [
        call
        for call in inside
        if isinstance(call.module, nn.Linear) and not any(call.path.startswith(f"{one.path}.") for one in mixing)
    ]
    hidden = block.output.shape[-1]
    # Each Linear that passes the entry test, with what feeds it.
    fed: list[tuple[Call, list[Call]]] = []
    for call in linears:
        width = call.first_input().shape[-1]
        if call.output.shape[-1] == hidden and width > hidden:
            wide = [other for other in linears if other is not call and other.output.shape[-1] in (width, 2 * width)]
            if entries := [entry for entry in wide if _feeds(block, entry, call)]:
                fed.append((call, entries))
    routed = [call for call in inside if is_fused(call.module)]
    if routed:
        projection, written = _experts(kind, layer, block, routed, fed, inside)
    else:
        projection, written = _mlp(kind, layer, block, fed, inside)
    if not _explains(block, written, mixing, inside):
        raise InputError(
            f"{kind}: {block.path} writes more than its attention and {projection.path}, such as routed experts; "
            "such models can't be analysed"
        )
    return projection


def _mlp(
    kind: str, layer: int, block: Call, fed: list[tuple[Call, list[Call]]], inside: list[Call]
) -> tuple[Projection, Call]:
    """Return the projection of a block without experts, and the call whose output the residual stream gets."""
    found = [(call, entries, *_writer(block, call, inside)) for call, entries in fed]
    found = [one for one in found if one[-1] is not None]
    if len(found) != 1:
        names = " and ".join(call.path for call, *_ in found) or "none"
        raise InputError(f"{kind}: one MLP output projection looked for in {block.path}, found {names}")
    ((call, entries, writer, factor),) = found
    gate, fused = _gate(block, entries, call)
    post_norm = None if writer is call else writer.path
    width = call.first_input().shape[-1]
    return Projection(
        "language", layer, call.path, gate, width, gate_fused=fused, post_norm=post_norm, scale=factor or 1.0
    ), writer


def _experts(
    kind: str, layer: int, block: Call, routed: list[Call], fed: list[tuple[Call, list[Call]]], inside: list[Call]
) -> tuple[Projection, Call]:
    """Return the projection of a block with fused experts, and the call whose output the residual stream gets."""
    unknown = InputError(f"{kind}: the experts of {block.path} are of an unknown kind; such models can't be analysed")
    if len(routed) > 1 or len(fed) > 1 or getattr(routed[0].module, "has_post_expert_norm", False):
        raise unknown
    (experts,) = routed
    scale, gate, fused = 1.0, None, False
    shared: Call | None = None
    weight: Call | None = None
    whole, (count, units, _) = experts, by_unit(experts.module).shape
    width = count * units
    if fed:
        ((shared, entries),) = fed
        around = [call for call in inside if all(one.path.startswith(f"{call.path}.") for one in (experts, shared))]
        if not around:
            raise unknown
        # The innermost one, whose output is the sum of the two.
        whole = max(around, key=lambda call: call.path.count("."))
        factors = _factors(whole, experts, shared, inside)
        gate, fused = _gate(block, entries, shared)
        if factors is None:
            raise unknown
        scale, weight = factors
        width += shared.first_input().shape[-1]
    writer, factor = _writer(block, whole, inside)
    if factor is None:
        raise unknown
    return Projection(
        "language",
        layer,
        whole.path,
        gate,
        width,
        experts=count,
        gate_fused=fused,
        routed_scale=scale,
        shared=shared.path if shared else None,
        shared_weight=weight.path if weight else None,
        post_norm=None if writer is whole else writer.path,
        scale=factor,
    ), writer


def _factors(whole: Call, experts: Call, shared: Call, inside: list[Call]) -> tuple[float, Call | None] | None:
    """Return the factor on what experts write in a module's output, and the weight of the shared one; None if unknown.

    The output is factor · experts + weight · shared. The weight is the sigmoid of a Linear with one output, or 1.
    """
    output, routed, own = (call.output.flatten(0, -2) for call in (whole, experts, shared))
    candidates = [call for call in inside if isinstance(call.module, nn.Linear) and call.output.shape[-1] == 1]
    for weight in (None, *candidates):
        share = own if weight is None else own * weight.output.flatten(0, -2).sigmoid()
        factor = _factor(routed, output - share)
        if factor is not None:
            return factor, weight
    return None


def _feeds(block: Call, entry: Call, call: Call) -> bool:
    """Return whether the entry's output reaches the projection's input elementwise: the entry test."""
    width = call.first_input().shape[-1]
    # Every other unit, so that mixing with a neighbour shows.
    units = torch.arange(0, width, 2)

    def change(output: Tensor) -> Tensor:
        rows = output.clone().flatten(0, -2)
        rows[0, units] += 1 + rows[0, units].abs()
        return rows.view(output.shape)

    seen = _rerun(block, entry, change, call)[1]
    if seen is None or seen.shape != call.first_input().shape:
        return False
    changed = (seen != call.first_input()).flatten(0, -2)
    elsewhere = changed.clone()
    elsewhere[0, units] = False
    return bool(changed.any()) and not bool(elsewhere.any())


def _writer(block: Call, call: Call, inside: list[Call]) -> tuple[Call, float | None]:
    """Return what passes the residual test (the projection, or a norm right after it) and the block's factor on it."""
    after = [
        other
        for other in inside
        if other.output.shape == call.output.shape
        and isinstance(getattr(other.module, "weight", None), Tensor)
        and torch.equal(other.first_input(), call.output)
    ]
    for writer in (call, *after):
        step = torch.randn(writer.output.shape, generator=torch.Generator().manual_seed(0))
        # Large compared with the block's output, so that the difference survives half precision.
        step = step.to(writer.output) * (8 * block.output.float().std()).to(writer.output)
        output, _ = _rerun(block, writer, partial(torch.add, step), None)
        factor = _factor(step.flatten(0, -2), (output - block.output).flatten(0, -2))
        if factor is not None:
            return writer, factor
    return call, None


def _explains(block: Call, write: Call, mixing: list[Call], inside: list[Call]) -> bool:
    """Return whether the block adds nothing to its input but this write and what mixes tokens."""
    # A norm may follow attention, as it may follow the MLP.
    normed = [
        call
        for call in inside
        for one in mixing
        if call.output.shape == one.output.shape == call.first_input().shape
        and torch.equal(call.first_input(), one.output)
    ]
    # In fp64, so that only the network's own rounding counts.
    parts = [block.first_input(), *(call.output for call in (write, *mixing, *normed))]
    terms = torch.stack([part.flatten().double() for part in parts], dim=1)
    output = block.output.flatten().double()
    # Terms may depend on each other: an attention module's output is that of a module inside it.
    fitted = terms @ torch.linalg.lstsq(terms, output, driver="gelsd").solution
    # As a fraction of what the block adds, which may be little of its output; plus the output's own rounding.
    allowed = 1e-2 * (output - terms[:, 0]).norm() + torch.finfo(block.output.dtype).eps * output.norm()
    return bool((output - fitted).norm() <= allowed)


def _mixes(block: Call, call: Call) -> bool:
    """Return whether what a module writes for the last token depends on what it gets for the first.

    That may be its own first token or, in cross-attention, the encoder's.
    """
    given = call.first_input()
    if not given.numel() == call.output.numel() == block.output.numel() or isinstance(call.module, nn.Linear):
        return False

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return _copy(value)
        rows = value.clone().flatten(0, -2)
        rows[0] += 1 + rows[0].abs()
        return rows.view(value.shape)

    arguments, named = map(moved, call.arguments), {name: moved(value) for name, value in call.named.items()}
    again = _tensor(call.module(*arguments, **named))
    if again is None:
        return False
    before, after = (output.flatten(0, -2)[-1].double() for output in (call.output, again))
    # Experts, too, give another result for a token grouped with others, but only by rounding.
    return float((after - before).norm()) > 3e-2 * float(before.norm())


def _gate(block: Call, entries: list[Call], call: Call) -> tuple[str | None, bool]:
    """Return the path of the gate's Linear (None for a plain MLP) and whether it computes the other factor too."""
    width = call.first_input().shape[-1]
    if len(entries) == 1 and entries[0].output.shape[-1] == width:
        return None, False
    for entry in entries:
        # Negating a linear factor negates the product; negating the gate, before its non-linearity, does not.
        def negate(output: Tensor) -> Tensor:
            return torch.cat((-output[..., :width], output[..., width:]), dim=-1)

        seen = _rerun(block, entry, negate, call)[1]
        if seen is None or not torch.allclose(seen, -call.first_input()):
            return entry.path, entry.output.shape[-1] != width
    return None, False


def _rerun(block: Call, altered: Call, change: Change, watched: Call | None) -> tuple[Tensor, Tensor | None]:
    """Run the block again with one module's output changed; return the block's output and the watched input."""
    seen: list[Tensor] = []

    def alter(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output)

    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].clone())

    with ExitStack() as stack:
        stack.enter_context(altered.module.register_forward_hook(alter))
        if watched is not None:
            stack.enter_context(watched.module.register_forward_pre_hook(watch))
        named = {name: _copy(value) for name, value in block.named.items()}
        output = _tensor(block.module(*(_copy(value) for value in block.arguments), **named))
    if output is None:
        raise InputError(f"{block.path}: its output is no tensor")
    return output, seen[-1] if seen else None


def _factor(given: Tensor, received: Tensor) -> float | None:
    """Return k if received = k * given up to the rounding of half precision; None if there is no k except 0."""
    if given.shape != received.shape:
        return None
    # In fp64, so that only the network's own rounding counts.
    given, received = given.double(), received.double()
    factor = float((given * received).sum() / (given * given).sum().clamp_min(1e-30))
    error = float((received - factor * given).norm() / received.norm().clamp_min(1e-30))
    if factor == 0 or error > 1e-2:
        return None
    return 1.0 if abs(factor - 1) < 1e-2 else factor


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensor(output: Any) -> Tensor | None:
    """Return the first tensor in a module's output, its hidden states."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
