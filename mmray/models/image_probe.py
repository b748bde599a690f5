"""Find how the image enters a model of unknown type, and the MLPs that it goes through before the decoder.

The model runs on an image and a question; on the same image half as bright; and with another question. What the image
changes and the question does not lies before the decoder:

    vision      lists of residual blocks with one MLP each, in the module that gets the pixels
    projector   all other MLPs, if they change the logits
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.head_probe import unembedding_of
from mmray.models.layout import Projection
from mmray.models.linear import is_linear
from mmray.models.mlp_probe import fed_linears, gate_of
from mmray.models.processing import IMAGE_MASK, example_inputs
from mmray.models.recorded_calls import Block, Call, copied, record_calls

WIDE = (150, 80)
"""Pixels of an image that is no square."""
OTHER_QUESTION = "How many animals and people are in this picture, and what are they doing there?"
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a network raises for inputs that it can't take."""


@torch.no_grad()
def image_entry(model: PreTrainedModel, first_block: str, processor: Any) -> tuple[str, int | None, int]:
    """Return `tokens` or `cross-attention`, the placeholder's token id, and how many positions come before the text.

    The input of the decoder's first block changes with the image at positions that all have one token in `input_ids`.
    (LLaVA-NeXT has the same token at the ends of rows, which do not change.) The id is None if the inputs mark the
    positions, or if these come before the text, with no tokens (GIT). If no position changes, or the last one does, the
    decoder attends to the image. Raises InputError if the image enters in another way.
    """
    kind = model.config.model_type
    inputs = example_inputs(kind, processor, model.config)
    others = (
        example_inputs(kind, processor, model.config, brightness=0.5),
        example_inputs(kind, processor, model.config, size=WIDE),
    )
    try:
        *pair, wide = (_until(model, first_block, given).flatten(0, -2) for given in (inputs, *others))
    except FAILURES as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{kind}: a forward with an image failed ({reason})") from error
    tokens = inputs["input_ids"][0]
    first, second = pair
    alike, before = first.shape == second.shape, len(first) - len(tokens)
    changed = (first != second).any(dim=-1).to(tokens.device) if alike else torch.zeros(0)
    # As many for an image of another shape, or captions could not be found in the sequence.
    steady = before == len(wide) - others[1]["input_ids"].shape[1]
    if before and steady and changed.nonzero().flatten().tolist() == list(range(before)):
        return "tokens", None, before
    if before or not alike:
        raise InputError(
            f"{kind}: {len(first)} positions in the decoder for {len(tokens)} tokens; "
            "models that put the image in other places than its tokens can't be analysed"
        )
    if not changed.any() or changed[-1]:
        return "cross-attention", None, 0
    if IMAGE_MASK in inputs and torch.equal(changed, inputs[IMAGE_MASK][0] == 1):
        return "tokens", None, 0
    placeholders = torch.unique(tokens[changed])
    if len(placeholders) != 1:
        raise InputError(f"{kind}: the image changes positions of {len(placeholders)} different tokens in the prompt")
    return "tokens", int(placeholders), 0


def placed(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs on the model's device, floating-point ones in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


class _ReachedError(Exception):
    """Ends a forward at the decoder's first block, whose input is the argument."""


def _until(model: PreTrainedModel, block: str, inputs: dict[str, Tensor]) -> Tensor:
    """Run the model up to a block and return its input: what follows would cost most of the time."""

    def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _ReachedError(next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor)))

    with model.get_submodule(block).register_forward_pre_hook(enter, with_kwargs=True):
        try:
            model(**placed(model, inputs))
        except _ReachedError as reached:
            return reached.args[0]  # type: ignore[no-any-return]
    raise RuntimeError(f"{block} did not run")


@dataclass(frozen=True)
class _Seen:
    """What the modules of interest got in one forward, in the order in which they ran, and what came of it."""

    calls: dict[str, Call]
    outcome: Tensor

    def same(self, other: _Seen, path: str) -> bool:
        """Return whether a module got the same in another forward."""
        if path not in other.calls:
            return False
        given, before = self.calls[path].inputs(), other.calls[path].inputs()
        return len(given) == len(before) and all(map(torch.equal, given, before))


@torch.no_grad()
def image_modules(
    model: PreTrainedModel, first_block: str, processor: Any, answer: dict[str, Tensor], image: str = "tokens"
) -> tuple[Projection, ...]:
    """Return the MLPs of the vision tower, then those of the projector; none if the model does not run on an image.

    `first_block`: path of the decoder's first block. `answer`: inputs of a decoder after an encoder. `image`: how the
    image enters.
    """
    # Where the image is in the decoder's first input, the decoder itself need not run.
    stop = first_block if image == "tokens" and not answer else None
    example = partial(example_inputs, model.config.model_type, processor, model.config)
    try:
        inputs = [example(), example(brightness=0.5), example(question=OTHER_QUESTION)]
        return _image_modules(model, first_block, [one | answer for one in inputs], stop)
    except (InputError, *FAILURES):
        return ()


def _image_modules(
    model: PreTrainedModel, first_block: str, inputs: Sequence[dict[str, Tensor]], stop: str | None
) -> tuple[Projection, ...]:
    """Return the MLPs that the image goes through.

    `inputs`: those of an image with a question, of the darker image, and with the other question.
    """
    decoder = first_block.rpartition(".")[0]
    lists = {
        path: [f"{path}.{index}" for index in range(len(module))]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _below(path, decoder) and not _is_mlp(module)
    }
    stacked = [decoder, *(block for blocks in lists.values() for block in blocks)]
    linears = [path for path, module in model.named_modules() if is_linear(module)]
    owners = {_owner(model, path) for path in linears if not any(_below(path, block) for block in stacked)}
    unembedding = unembedding_of(model)
    head = next(path for path, module in model.named_modules() if module is unembedding)
    owners = {path for path in owners if path and not _below(decoder, path) and not _below(head, path)}
    above = {path: _above(path, decoder) for path in lists}
    watched = {*stacked[1:], *owners, *(path for paths in above.values() for path in paths)}
    seen, darker, asked = (_seen(model, watched, given, stop) for given in inputs)
    pictured = [path for path in seen.calls if seen.same(asked, path) and not seen.same(darker, path)]
    tower: dict[str, list[Projection]] = {}
    bridge: dict[str, list[Projection]] = {}
    # Outermost first: a stage of several blocks has several MLPs, and the list inside it is found later.
    for path in sorted(lists, key=lambda path: path.count(".")):
        blocks = [seen.calls[block] for block in lists[path] if block in pictured]
        if len(blocks) < len(lists[path]) or any(_below(path, other) for other in (*tower, *bridge)):
            continue
        found = [_mlps(block) for block in blocks]
        inner = any(other != path and _below(other, path) for other in lists)
        if all(len(mlps) == 1 if inner else mlps for mlps in found):
            residual = all(block.output.shape == block.first_input().shape for block in blocks)
            pixels = any(_gets_pixels(seen.calls.get(one), inputs[0]) for one in above[path])
            (tower if residual and pixels else bridge)[path] = [mlp for mlps in found for mlp in mlps]
    for path in pictured:
        mlps = _mlps(seen.calls[path]) if path in owners else []
        if used := [mlp for mlp in mlps if _matters(model, mlp, inputs[0], seen, stop)]:
            bridge[path] = used
    return tuple(
        replace(mlp, module=module, layer=layer)
        for module, parts in (("vision", tower), ("projector", bridge))
        for layer, mlp in enumerate(mlp for path in sorted(parts, key=_order(pictured)) for mlp in parts[path])
    )


def _seen(model: PreTrainedModel, paths: Collection[str], inputs: dict[str, Tensor], stop: str | None) -> _Seen:
    """Run the model, up to a block if one is given, and keep the last calls of these modules."""
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for path in paths:
            record_calls(stack, path, model.get_submodule(path), calls)
        return _Seen(calls, _outcome(model, inputs, stop))


def _outcome(model: PreTrainedModel, inputs: dict[str, Tensor], stop: str | None) -> Tensor:
    """Return the logits or, if the model stops at a block, its input."""
    if stop is not None:
        return _until(model, stop, inputs)
    logits: Tensor = model(**placed(model, inputs)).logits
    return logits


def _mlps(call: Call) -> list[Projection]:
    """Return the MLPs of a module, which runs again."""
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for path, module in call.module.named_modules():
            if path:
                record_calls(stack, f"{call.path}.{path}", module, calls)
        call.module(*map(copied, call.arguments), **{name: copied(value) for name, value in call.named.items()})
    block = Block(call, list(calls.values()))
    mlps: list[Projection] = []
    for found, entries in fed_linears(block):
        gate, fused = gate_of(block, entries, found)
        mlps.append(Projection("", 0, found.path, gate, found.first_input().shape[-1], gate_fused=fused))
    return mlps


def _matters(model: PreTrainedModel, mlp: Projection, inputs: dict[str, Tensor], seen: _Seen, stop: str | None) -> bool:
    """Return whether what an MLP writes changes what comes of a forward: some towers have heads that nothing reads."""
    with model.get_submodule(mlp.path).register_forward_hook(lambda _, __, output: output + output.abs() + 1):
        return not torch.equal(_outcome(model, inputs, stop), seen.outcome)


def _gets_pixels(root: Call | None, inputs: dict[str, Tensor]) -> bool:
    """Return whether a module's input is an image, as the processor gives it or in tiles."""
    shapes = [value.shape for value in inputs.values() if value.is_floating_point()]
    return root is not None and any(root.first_input().shape[-2:] == shape[-2:] for shape in shapes)


def _below(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def _is_mlp(modules: nn.ModuleList) -> bool:
    """Return whether a list is one MLP's layers (Qwen-Omni's merger), not blocks."""
    return any(is_linear(module) for module in modules)


def _owner(model: nn.Module, path: str) -> str:
    """Return the module around a Linear that runs: lists do not."""
    owner = path.rpartition(".")[0]
    return _owner(model, owner) if isinstance(model.get_submodule(owner), nn.ModuleList) else owner


def _above(path: str, decoder: str) -> list[str]:
    """Return the modules around a list that do not hold the decoder."""
    parts = path.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts))]
    return [prefix for prefix in prefixes if not _below(decoder, prefix)]


def _order(pictured: list[str]) -> Callable[[str], int]:
    """Return the key that sorts lists and modules by when they first ran."""
    return lambda path: next(index for index, ran in enumerate(pictured) if _below(ran, path))
