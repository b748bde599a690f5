"""Find the decoder's MLP output projections in a model of unknown type, by what they do in one tiny forward.

No name is trusted. The final norm is the module whose output the unembedding receives; the decoder is the list of
blocks whose last output that norm receives. Within a block an output projection is a Linear with more inputs than
outputs that passes two tests:

    entry     some other Linear of the block feeds it element by element: a change of unit j at one token there is seen
              at unit j of that token and nowhere else (no attention lies between, and no other mixing)
    residual  what is added to its output is added to the block's output, alone and unchanged (or times a constant)

Two entries make a gated MLP: of the two, the gate is the one that the projection's input is not linear in.
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
from mmray.models.layout import ModelParts, Projection

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One module's part in the recorded forward."""

    path: str
    module: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor

    def first_input(self) -> Tensor:
        """Return the first tensor that the module was given."""
        return next(value for value in (*self.arguments, *self.named.values()) if isinstance(value, Tensor))


@torch.no_grad()
def probe(model: PreTrainedModel) -> ModelParts:
    """Find the language projections, the final norm and the unembedding; vision and projector are left out.

    Runs four tokens of text through the language model once, then its blocks alone a few times each. Raises
    InputError saying what was not found.
    """
    kind = model.config.model_type
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{kind}: no output embeddings, so no token to score neurons for")
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is None:
        raise InputError(f"{kind}: no image_token_id in its configuration, so how the image enters is unknown")
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
    """Run four tokens of text, and return every module's call by its path, and whether there is an encoder.

    What runs is the smallest model round the unembedding: BLIP-2 as a whole can't do without an image.
    """
    head_path = next(path for path, module in model.named_modules() if module is head)
    owners = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    prefix, owner = max(
        (pair for pair in owners if not pair[0] or head_path.startswith(f"{pair[0]}.")), key=lambda pair: len(pair[0])
    )
    vocabulary = head.get_parameter("weight").shape[0]
    tokens = torch.tensor([[vocabulary // 2 + step for step in range(4)]], device=head.get_parameter("weight").device)
    # An image's placeholder without an image is an error in some families.
    tokens[tokens == model.config.image_token_id] = vocabulary // 2 + 4
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    encoder_decoder = bool(getattr(owner.config, "is_encoder_decoder", False))
    if encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for path, module in owner.named_modules():
            _listen(stack, f"{prefix}.{path}".strip("."), module, calls)
        try:
            owner(**inputs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{model.config.model_type}: a forward of text alone failed ({reason})") from error
    return calls, encoder_decoder


def _listen(stack: ExitStack, path: str, module: nn.Module, calls: dict[str, Call]) -> None:
    """Record the module's last call. Inputs are copied before, for a block may add to its input in place."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        copies = {name: _copy(value) for name, value in named.items()}
        given.append((tuple(_copy(value) for value in arguments), copies))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        arguments, named = given.pop()
        if (tensor := _tensor(output)) is not None:
            calls[path] = Call(path, module, arguments, named, tensor.clone())

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _final_norm(kind: str, calls: dict[str, Call], head: nn.Module) -> tuple[Call, float]:
    """Return the norm whose output the unembedding was given, and the factor between the two."""
    received = next(call for call in calls.values() if call.module is head).first_input()
    for call in reversed(calls.values()):
        weight = getattr(call.module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            factor = _factor(call.output, received)
            if factor is not None:
                return call, factor
    raise InputError(f"{kind}: no norm's output is what the unembedding receives")


def _blocks(kind: str, model: nn.Module, calls: dict[str, Call], norm: Call) -> list[Call]:
    """Return the calls of the decoder's blocks, in order: the list whose last block's output the norm was given."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # Outermost first: T5's blocks hold lists of their own, the last of which ends with the same output.
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
    linears = [call for call in inside if isinstance(call.module, nn.Linear)]
    hidden = block.output.shape[-1]
    found: list[Projection] = []
    for call in linears:
        width = call.first_input().shape[-1]
        if call.output.shape[-1] != hidden or width <= hidden:
            continue
        entries = [
            entry
            for entry in linears
            if entry is not call and entry.output.shape[-1] in (width, 2 * width) and _feeds(block, entry, call)
        ]
        if not entries:
            continue
        writer, factor = _writer(block, call, inside)
        if factor is None:
            continue
        gate, fused = _gate(block, entries, call)
        post_norm = None if writer is call else writer.path
        found.append(
            Projection("language", layer, call.path, gate, width, gate_fused=fused, post_norm=post_norm, scale=factor)
        )
    if len(found) != 1:
        names = " and ".join(projection.path for projection in found) or "none"
        raise InputError(f"{kind}: one MLP output projection looked for in {block.path}, found {names}")
    return found[0]


def _feeds(block: Call, entry: Call, call: Call) -> bool:
    """Say whether the entry's output reaches the projection's input element by element: the entry test."""
    width = call.first_input().shape[-1]
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
    """Return what passes the residual test, the projection or a norm right after it, and the block's factor for it."""
    after = [
        other
        for other in inside
        if other.output.shape == call.output.shape
        and isinstance(getattr(other.module, "weight", None), Tensor)
        and torch.equal(other.first_input(), call.output)
    ]
    for writer in (call, *after):
        step = torch.randn(writer.output.shape, generator=torch.Generator().manual_seed(0))
        # Large against the block's output, so that half precision does not drown what the factor is measured by.
        step = step.to(writer.output) * (8 * block.output.float().std()).to(writer.output)
        output, _ = _rerun(block, writer, partial(torch.add, step), None)
        factor = _factor(step.flatten(0, -2), (output - block.output).flatten(0, -2))
        if factor is not None:
            return writer, factor
    return call, None


def _gate(block: Call, entries: list[Call], call: Call) -> tuple[str | None, bool]:
    """Return the path of the gate's Linear, and whether it holds the other factor too; None for a plain MLP."""
    width = call.first_input().shape[-1]
    if len(entries) == 1 and entries[0].output.shape[-1] == width:
        return None, False
    for entry in entries:

        def negate(output: Tensor) -> Tensor:
            return torch.cat((-output[..., :width], output[..., width:]), dim=-1)

        seen = _rerun(block, entry, negate, call)[1]
        if seen is None or not torch.allclose(seen, -call.first_input()):
            return entry.path, entry.output.shape[-1] != width
    return None, False


def _rerun(block: Call, altered: Call, change: Change, watched: Call | None) -> tuple[Tensor, Tensor | None]:
    """Run the block again with one module's output changed; return its output and the watched module's input."""
    seen: list[Tensor] = []

    def alter(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output)

    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].clone())

    with ExitStack() as stack:
        stack.callback(altered.module.register_forward_hook(alter).remove)
        if watched is not None:
            stack.callback(watched.module.register_forward_pre_hook(watch).remove)
        named = {name: _copy(value) for name, value in block.named.items()}
        output = _tensor(block.module(*(_copy(value) for value in block.arguments), **named))
    if output is None:
        raise InputError(f"{block.path}: its output is no tensor")
    return output, seen[-1] if seen else None


def _factor(given: Tensor, received: Tensor) -> float | None:
    """Return k where received = k * given up to the rounding of half precision; None where there is no such k but 0."""
    if given.shape != received.shape:
        return None
    given, received = given.double(), received.double()
    factor = float((given * received).sum() / (given * given).sum().clamp_min(1e-30))
    error = float((received - factor * given).norm() / received.norm().clamp_min(1e-30))
    if factor == 0 or error > 1e-2:
        return None
    return 1.0 if abs(factor - 1) < 1e-2 else factor


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensor(output: Any) -> Tensor | None:
    """Return the hidden state of a module's output: the tensor, or the first of several."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
