"""Find the decoder's MLP output projections in a model of unknown type, by how they behave in one tiny forward.

No names are trusted. The final norm is the module whose output the unembedding receives. The decoder is the list of
blocks whose last output that norm receives. An output projection is a Linear of a block, with more inputs than outputs
if there is one, that passes two tests:

    entry     another Linear of the block feeds it elementwise: changing unit j of one token there changes unit j of
              that token here and nothing else, so neither attention nor other mixing lies between. Where a norm lies
              between (Kosmos-2), the test is of the norm's input
    residual  what is added to its output is added to the block's output, unchanged or times a constant

Two entries make a gated MLP. The gate is the one in which the projection's input is not linear.

The block's output must be a sum of its input, the projection's output, outputs of modules that mix tokens, and what the
block makes of further inputs (Gemma 4's per-layer embeddings); each times a constant. Otherwise the model is refused:
contributions would leave out what some other part writes. Where a block ends with a norm (BERT, BART), the sum is the
norm's input.

Where a block has fused experts, their output takes the projection's place; or the output of the module that adds to it
what one more MLP writes, times a weight: the expert that every token goes through.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.checkpoint import reads_images
from mmray.models.experts import by_unit, is_fused, written_by
from mmray.models.head_probe import logit_scale, norm_before, transform_around, unembedding_of
from mmray.models.image_probe import FAILURES, image_entry, image_modules, placed
from mmray.models.layout import PROBED, ModelParts, Projection
from mmray.models.linear import is_linear, sizes
from mmray.models.mlp_probe import fed_linears, gate_of
from mmray.models.processing import example_inputs
from mmray.models.recorded_calls import Block, Call, factor, record_calls


@torch.no_grad()
def probe(model: PreTrainedModel, processor: Any = None) -> ModelParts:
    """Find the language projections, the final norm and the unembedding; with a processor, also what the image meets.

    Runs four tokens of text through the language model once, then each block a few times. A model that does not run
    without an image needs its processor, and so does one whose configuration does not name the image's placeholder.
    Raises InputError that says what was not found.
    """
    kind = model.config.model_type
    head = unembedding_of(model)
    image, image_token_id, image_before = "tokens", getattr(model.config, "image_token_id", None), 0
    if not reads_images(model.config):
        image, image_token_id, processor = "none", None, None
    elif image_token_id is None and processor is None:
        raise InputError(f"{kind}: no image_token_id in its configuration, so how the image enters is unknown")
    # Dropout would make two runs differ.
    training = model.training
    model.eval()
    try:
        calls, answer = _record(model, head, processor)
        unembedding = next(call for call in calls.values() if call.module is head)
        norm, scale_before = norm_before(kind, calls, unembedding.first_input())
        if (transform := transform_around(calls, norm)) is not None:
            norm, _ = norm_before(kind, calls, transform.first_input())
        scale_after, logit_cap = logit_scale(model, calls, unembedding)
        blocks = _blocks(kind, model, calls, norm)
        projections = tuple(_projection(kind, layer, block) for layer, block in enumerate(blocks))
        if image != "none" and image_token_id is None and not answer:
            image, image_token_id, image_before = image_entry(model, blocks[0].path, processor)
        if processor is not None:
            projections += image_modules(model, blocks[0].path, processor, answer, image)
    finally:
        model.train(training)
    return ModelParts(
        family=PROBED,
        projections=projections,
        final_norm=norm.path,
        unembedding=unembedding.path,
        transform=None if transform is None else transform.path,
        image=image,
        image_token_id=image_token_id,
        image_before=image_before,
        encoder_decoder=bool(answer),
        logit_scale=scale_before * scale_after,
        logit_cap=logit_cap,
    )


def _record(model: PreTrainedModel, head: nn.Module, processor: Any) -> tuple[dict[str, Call], dict[str, Tensor]]:
    """Return every module's last call by its path, and the inputs that a decoder needs after an encoder.

    Runs four tokens of text or, if that fails, a question with an image.
    """
    # Run the smallest model that contains the unembedding: BLIP-2 as a whole needs an image.
    head_path = next(path for path, module in model.named_modules() if module is head)
    owners = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    prefix, owner = max(
        (pair for pair in owners if not pair[0] or head_path.startswith(f"{pair[0]}.")), key=lambda pair: len(pair[0])
    )
    vocabulary = sizes(head)[1]
    # Special tokens are at either end of most vocabularies.
    tokens = torch.tensor(
        [[vocabulary // 2 + step for step in range(4)]], device=model.get_input_embeddings().weight.device
    )
    # Some families raise for an image placeholder without an image.
    if (placeholder := getattr(model.config, "image_token_id", None)) is not None:
        tokens[tokens == placeholder] = vocabulary // 2 + 4
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    # A decoder inside an encoder-decoder runs alone (VisionEncoderDecoder), the whole does not.
    whole, own = (getattr(one.config, "is_encoder_decoder", False) for one in (model, owner))
    answer = {"decoder_input_ids": tokens} if whole or own else {}
    try:
        return _calls_of(owner, prefix, text | answer if own else text), answer
    except InputError:
        if processor is None:
            raise
    inputs = example_inputs(model.config.model_type, processor, model.config)
    return _calls_of(model, "", placed(model, inputs) | answer), answer


def _calls_of(network: PreTrainedModel, prefix: str, inputs: dict[str, Tensor]) -> dict[str, Call]:
    """Run the network and return the calls by their paths below `prefix`."""
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for path, module in network.named_modules():
            record_calls(stack, f"{prefix}.{path}".strip("."), module, calls)
        try:
            network(**inputs, use_cache=False)
        except FAILURES as error:
            reason = " ".join(str(error).split())[:120]
            what = "text and an image" if "pixel_values" in inputs else "text alone"
            raise InputError(f"{network.config.model_type}: a forward of {what} failed ({reason})") from error
    return calls


def _blocks(kind: str, model: nn.Module, calls: dict[str, Call], norm: Call) -> list[Block]:
    """Return the decoder's blocks in order: the list whose last output the norm received, or whose last one it ends."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # Outermost first: T5's blocks contain lists too, and the last one ends with the same output.
    for path, modules in sorted(lists, key=lambda pair: pair[0].count(".")):
        last = calls.get(f"{path}.{len(modules) - 1}")
        if last is None:
            continue
        ends = norm.path.startswith(f"{last.path}.") and torch.equal(last.output, norm.output)
        if not ends and factor(last.output, norm.first_input()) is None:
            continue
        found = [calls.get(f"{path}.{index}") for index in range(len(modules))]
        ran = [call for call in found if call is not None]
        if len(ran) < len(found):
            raise InputError(f"{kind}: {path}.{found.index(None)} has no part in a forward of text alone")
        return [Block(one, [call for path, call in calls.items() if path.startswith(f"{one.path}.")]) for one in ran]
    # Gemma 3n's AltUp: what a block writes reaches the final norm by several ways, with weights of their own.
    outputs = [
        calls[path].output for path in (f"{path}.{len(modules) - 1}" for path, modules in lists) if path in calls
    ]
    streams = next((len(one) for one in outputs if one.shape[1:] == norm.first_input().shape), None)
    if streams is not None:
        raise InputError(
            f"{kind}: its blocks pass on {streams} streams, which are mixed before {norm.path}; "
            "a neuron's write has no single place among them"
        )
    raise InputError(f"{kind}: no list of blocks ends with what {norm.path} receives")


def _projection(kind: str, layer: int, block: Block) -> Projection:
    """Find the one MLP output projection of a block."""
    fed = fed_linears(block)
    routed = [call for call in block.inside if is_fused(call.module)]
    if routed:
        projection, written = _experts(kind, layer, block, routed, fed)
    else:
        # An MLP is wider than what it writes, in nearly all models; an adapter next to it is narrower.
        wide = [(call, entries) for call, entries in fed if call.first_input().shape[-1] > call.output.shape[-1]]
        projection, written = _mlp(kind, layer, block, wide or fed)
    if not _explains(block, written):
        raise InputError(
            f"{kind}: {block.path} writes more than its attention and {projection.path}, such as routed experts; "
            "such models can't be analysed"
        )
    return projection


def _mlp(kind: str, layer: int, block: Block, fed: list[tuple[Call, list[Call]]]) -> tuple[Projection, Call]:
    """Return the projection of a block without experts, and the call whose output the residual stream gets."""
    found = [(call, entries, *_writer(block, call)) for call, entries in fed]
    found = [one for one in found if one[-1] is not None]
    if len(found) != 1:
        names = " and ".join(call.path for call, *_ in found) or "none; a block without an MLP has no neurons"
        raise InputError(f"{kind}: one MLP output projection looked for in {block.path}, found {names}")
    ((call, entries, writer, scale),) = found
    gate, fused = gate_of(block, entries, call)
    post_norm = None if writer is call else writer.path
    width = call.first_input().shape[-1]
    return Projection(
        "language",
        layer,
        call.path,
        gate,
        width,
        gate_fused=fused,
        post_norm=post_norm,
        scale=scale or 1.0,
        ends_block=_ends(block),
    ), writer


def _experts(
    kind: str, layer: int, block: Block, routed: list[Call], fed: list[tuple[Call, list[Call]]]
) -> tuple[Projection, Call]:
    """Return the projection of a block with fused experts, and the call whose output the residual stream gets."""
    unknown = InputError(f"{kind}: the experts of {block.path} are of an unknown kind; such models can't be analysed")
    if len(routed) > 1 or len(fed) > 1 or getattr(routed[0].module, "has_post_expert_norm", False):
        raise unknown
    (experts,) = routed
    routed_scale, gate, fused = 1.0, None, False
    shared: Call | None = None
    weight: Call | None = None
    whole, (count, units, _) = experts, by_unit(experts.module).shape
    width = count * units
    if fed:
        ((shared, entries),) = fed
        gate, fused = gate_of(block, entries, shared)
        width += shared.first_input().shape[-1]
    # Also those that did not run: ERNIE-4.5-VL's for images.
    parts = {f"{block.path}.{path}" for path, module in block.call.module.named_modules() if is_fused(module)}
    parts |= {shared.path} if shared else set()
    if len(parts) > 1:
        around = [call for call in block.inside if all(part.startswith(f"{call.path}.") for part in parts)]
        if not around:
            raise unknown
        # The innermost one, whose output is the sum of them.
        whole = max(around, key=lambda call: call.path.count("."))
        factors = _factors(whole, experts, shared, block.inside)
        if factors is None:
            raise unknown
        routed_scale, weight = factors
    writer, scale = _writer(block, whole)
    if scale is None:
        raise unknown
    return Projection(
        "language",
        layer,
        whole.path,
        gate,
        width,
        experts=count,
        gate_fused=fused,
        routed_scale=routed_scale,
        shared=shared.path if shared else None,
        shared_weight=weight.path if weight else None,
        post_norm=None if writer is whole else writer.path,
        scale=scale,
        ends_block=_ends(block),
    ), writer


def _factors(whole: Call, experts: Call, shared: Call | None, inside: list[Call]) -> tuple[float, Call | None] | None:
    """Return the factor on what experts write in a module's output, and the weight of the shared one; None if unknown.

    The output is factor · experts + weight · shared. The weight is the sigmoid of a Linear with one output, or 1.
    """
    output, routed = whole.output.flatten(0, -2), written_by(experts.module, experts.output.flatten(0, -2))
    own = torch.zeros_like(output) if shared is None else shared.output.flatten(0, -2)
    candidates = [call for call in inside if is_linear(call.module) and call.output.shape[-1] == 1]
    for weight in (None, *candidates):
        share = own if weight is None else own * weight.output.flatten(0, -2).sigmoid()
        found = factor(routed, output - share)
        if found is not None:
            return found, weight
    return None


def _writer(block: Block, call: Call) -> tuple[Call, float | None]:
    """Return what passes the residual test (the projection, or a norm right after it) and the block's factor on it."""
    after = [
        other
        for other in block.inside
        if other.output.shape == call.output.shape
        and isinstance(getattr(other.module, "weight", None), Tensor)
        and other is not block.end
        and torch.equal(other.first_input(), call.output)
    ]
    # What the block makes of side inputs may depend on what the projection writes.
    alone = bool(block.silent_alone)
    before = block.total_with(call, torch.clone, alone=alone)
    for writer in (call, *after):
        step = torch.randn(writer.output.shape, generator=torch.Generator().manual_seed(0))
        # Large compared with the block's output, so that the difference survives half precision.
        step = step.to(writer.output) * (8 * block.total.float().std()).to(writer.output)
        total = block.total_with(writer, partial(torch.add, step), alone=alone)
        found = factor(step.flatten(0, -2), (total - before).flatten(0, -2))
        if found is not None:
            return writer, found
    return call, None


def _ends(block: Block) -> bool:
    """Return whether the block does nothing with the sum of its input and its writes, but return it."""
    return block.end is None and not block.silent_alone


def _explains(block: Block, write: Call) -> bool:
    """Return whether a block adds nothing but this write, what mixes tokens, and what it makes of side inputs."""
    shaped = [call for call in block.inside if call.output.numel() == block.total.numel()]
    # A norm may follow attention, as it may follow the MLP.
    normed = [call for call in shaped for one in block.mixing if torch.equal(call.first_input(), one.output)]
    terms = [block.call.first_input(), *(call.output for call in block.mixing)]
    if block.end is not None:
        # BERT and BART normalise the stream itself after attention; the normed one goes on.
        for norm in (call for call in shaped if call.is_norm and call is not block.end):
            if _spans([*terms, *(call.output for call in normed)], norm.first_input()):
                normed.append(norm)
    aside = [call for call in shaped if call in block.silent_alone]
    return _spans([*terms, *(call.output for call in (write, *normed, *aside))], block.total)


def _spans(parts: list[Tensor], total: Tensor) -> bool:
    """Return whether a sum of these parts, each times a constant, is the total; the first is the block's input."""
    # In fp64, so that only the network's own rounding counts.
    terms, output = torch.stack([part.flatten().double() for part in parts], dim=1), total.flatten().double()
    # Terms may depend on each other: an attention module's output is that of a module inside it.
    fitted = terms @ torch.linalg.lstsq(terms, output, driver="gelsd").solution
    # As a fraction of what the block adds, which may be little of its output; plus the output's own rounding.
    allowed = 1e-2 * (output - terms[:, 0]).norm() + torch.finfo(total.dtype).eps * output.norm()
    return bool((output - fitted).norm() <= allowed)
