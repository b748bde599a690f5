"""Find where a model keeps its neurons (MLP output projections, final norm, unembedding), and read and write rows."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.experts import Experts, by_unit
from mmray.models.families import DECODERS, FAMILIES, TOWERS, Decoder, Family, Stack
from mmray.models.layout import ModelParts, Projection
from mmray.models.linear import READ_ONLY, is_linear, is_quantised, rows_of, sizes
from mmray.models.probe import probe

__all__ = [
    "ModelParts",
    "Projection",
    "gain_of",
    "locate",
    "output_rows",
    "set_output_rows",
    "unembedding_rows",
]


class _MissingError(Exception):
    """A table's row names something that this model does not have, or has in another shape."""


def locate(model: PreTrainedModel, processor: Any = None) -> ModelParts:
    """Find the model's parts by the tables of families or, if no row fits, by the structural probe.

    The probe needs the model's processor where the configuration does not name the image's placeholder. Raises
    InputError if neither finds the parts, or if experts are quantised.
    """
    parts = _find(model, processor)
    for projection in parts.projections:
        if projection.experts and not Experts.of(model, projection).are_dense:
            raise InputError(
                f"{projection.path}: experts with quantised weights have no rows to score; "
                "use a checkpoint in fp16, bf16 or fp32"
            )
    return parts


def _find(model: PreTrainedModel, processor: Any) -> ModelParts:
    text_type = model.config.get_text_config().model_type
    family, decoder = FAMILIES.get(model.config.model_type), DECODERS.get(text_type)
    if family is None or decoder is None:
        return probe(model, processor)
    try:
        return read_table(model, family, decoder)
    except _MissingError as missing:
        try:
            return probe(model, processor)
        except InputError as error:
            raise InputError(f"{model.config.model_type} with {text_type}: {missing}; and {error}") from error


def read_table(model: PreTrainedModel, family: Family, decoder: Decoder) -> ModelParts:
    """Return the parts at the table's paths, after checking that each exists, has the right type, and is one per layer.

    An unknown vision tower leaves `vision` empty. Raises _MissingError for any other missing part.
    """
    config = model.config
    text_config = config.get_text_config()
    root = _first(model, family.decoder)
    language = tuple(_stack(model, "language", root, (decoder.stack,)))
    if len(language) != text_config.num_hidden_layers:
        raise _MissingError(f"{len(language)} MLPs in the decoder for {text_config.num_hidden_layers} layers")
    tower = TOWERS.get(config.vision_config.model_type, ()) if family.tower else ()
    vision = tuple(_stack(model, "vision", family.tower, tower))
    projector = tuple(_stack(model, "projector", "", family.projectors))
    final_norm = _join(root, decoder.final_norm)
    for path in (final_norm, family.unembedding):
        _module(model, path)
    # A table's path may exist and still be another head.
    if model.get_submodule(family.unembedding) is not model.get_output_embeddings():
        raise _MissingError(f"{family.unembedding} is not the model's output embeddings")
    scaled = bool(getattr(text_config, "scale_decoder_outputs", False))
    return ModelParts(
        family=config.model_type,
        projections=language + vision + projector,
        final_norm=final_norm,
        unembedding=family.unembedding,
        image=family.image,
        image_token_id=getattr(config, "image_token_id", None),
        streams=root if decoder.streams else None,
        encoder_decoder=decoder.encoder_decoder,
        logit_scale=text_config.hidden_size**-0.5 if scaled else 1.0,
        logit_cap=getattr(text_config, "final_logit_softcapping", None),
    )


def output_rows(model: PreTrainedModel, projection: Projection) -> Float[Tensor, "neuron hidden"]:
    """Return the rows of W_out: what each neuron adds to the projection's output per unit of activation.

    For a Linear or GPT-2's Conv1D a view of the weight; for experts a copy, (expert, unit) flattened and the shared
    expert's last, so write with `set_output_rows`; for quantised layers a dequantised copy. A norm after the projection
    and `Projection.scale` are not applied.
    """
    if projection.experts:
        return Experts.of(model, projection).rows()
    return rows_of(model.get_submodule(projection.path), model.dtype)


@torch.no_grad()
def set_output_rows(
    model: PreTrainedModel, projection: Projection, units: Int[Tensor, " unit"], rows: Float[Tensor, "unit hidden"]
) -> None:
    """Write these neurons' rows of W_out into the weights of the Linear, Conv1D or experts.

    Raises InputError for a quantised layer.
    """
    if projection.experts:
        Experts.of(model, projection).set_rows(units, rows)
    elif is_quantised(model.get_submodule(projection.path)):
        raise InputError(f"{projection.path}: {READ_ONLY}")
    else:
        output_rows(model, projection)[units] = rows


def unembedding_rows(model: PreTrainedModel, parts: ModelParts) -> Float[Tensor, "vocabulary hidden"]:
    """Return the unembedding's rows, one per token: a view of the weight, or dequantised."""
    return rows_of(model.get_submodule(parts.unembedding), model.dtype).T


@torch.no_grad()
def gain_of(norm: nn.Module) -> Float[Tensor, " hidden"]:
    """Return a norm's factor on each normalised coordinate."""
    # Measured, because Gemma's gain is its weight plus one. Inputs of mean 0 and variance 1 pass LayerNorm and RMSNorm
    # unchanged, up to their epsilon; the difference of two removes a bias.
    weight = norm.get_parameter("weight")
    signs = torch.ones_like(weight)
    signs[::2] = -1.0
    gain: Tensor = (norm(signs) - norm(-signs)) / 2 * signs
    return gain


def _stack(model: nn.Module, module: str, root: str, stacks: tuple[Stack, ...]) -> Iterator[Projection]:
    """Yield the projections of a module's stacks, with layers numbered across stacks."""
    layer = 0
    for stack in stacks:
        try:
            blocks = _join(root, _first(model.get_submodule(root), stack.blocks))
        except _MissingError:
            if stack.optional:
                continue
            raise
        found = model.get_submodule(blocks)
        paths = [f"{blocks}.{index}" for index in range(len(found))] if isinstance(found, nn.ModuleList) else [blocks]
        for path in paths:
            yield _projection(model, module, layer, path, stack)
            layer += 1


def _projection(model: nn.Module, module: str, layer: int, block: str, stack: Stack) -> Projection:
    """Describe the MLP of one block."""
    path = _first(model, tuple(_join(block, choice) for choice in stack.projection))
    found = _module(model, path)
    experts = 0
    if is_linear(found):
        width, _ = sizes(found)
    elif isinstance(weight := getattr(found, "down_proj", None), nn.Parameter) and weight.dim() == 3:
        if getattr(found, "has_post_expert_norm", False):
            raise _MissingError(f"{path} normalises each expert's output, which no row of W_out can stand for")
        experts, units, _ = by_unit(found).shape
        width = experts * units
    else:
        raise _MissingError(f"{path} is a {type(found).__name__}, neither a Linear nor fused experts")
    gate = next((_join(block, choice) for choice in stack.gate if _has(model, _join(block, choice))), None)
    outputs = width if gate is None else sizes(model.get_submodule(gate))[1]
    if outputs not in (width, 2 * width):
        raise _MissingError(f"{gate} has {outputs} outputs, and {path} {width} inputs")
    post_norm = _join(block, stack.post_norm) if stack.post_norm else None
    if post_norm is not None:
        _module(model, post_norm)
    scale = 1.0
    if stack.residual_gate and _has(model, _join(block, stack.residual_gate)):
        weight = model.get_parameter(_join(block, stack.residual_gate)).detach()
        # On the meta device there are no weights to read, and the scale is not used.
        scale = 1.0 if weight.is_meta else float(weight.tanh())
    return Projection(
        module,
        layer,
        path,
        gate,
        width,
        experts,
        gate_fused=outputs != width,
        post_norm=post_norm,
        reads_text=stack.reads_text,
        scale=scale,
        ends_block=stack.ends_block,
    )


def _join(root: str, path: str) -> str:
    return f"{root}.{path}" if root and path else root or path


def _has(model: nn.Module, path: str) -> bool:
    """Return whether the model has a module or a parameter of this path."""
    parent, _, name = path.rpartition(".")
    try:
        return hasattr(model.get_submodule(parent), name)
    except AttributeError:
        return False


def _module(model: nn.Module, path: str) -> nn.Module:
    """Return the module of this path; raises _MissingError if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise _MissingError(f"there is no module {path}") from None


def _first(model: nn.Module, choices: tuple[str, ...]) -> str:
    """Return the first path that the model has; raises _MissingError if it has none."""
    for choice in choices:
        if _has(model, choice):
            return choice
    raise _MissingError(f"there is no module {' or '.join(choices)}")
