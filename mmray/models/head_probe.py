"""Find a model's end: the unembedding, the norm before it, and what else happens to states and logits there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.linear import is_linear
from mmray.models.mlp_probe import feeds
from mmray.models.recorded_calls import Block, Call, factor, rerun


def unembedding_of(model: PreTrainedModel) -> nn.Module:
    """Return the model's output embeddings or, where it names none (BLIP), those of the one decoder inside it.

    Raises InputError if there are none, or several.
    """
    own: nn.Module | None = model.get_output_embeddings()
    if own is not None:
        return own
    inner = (module.get_output_embeddings() for module in model.modules() if isinstance(module, PreTrainedModel))
    found: dict[int, nn.Module] = {id(head): head for head in inner if head is not None}
    if len(found) != 1:
        raise InputError(f"{model.config.model_type}: no output embeddings, so no token to score neurons for")
    return found.popitem()[1]


def norm_before(kind: str, calls: dict[str, Call], received: Tensor) -> tuple[Call, float]:
    """Return the last norm whose output this is, and the factor between the two."""
    for call in reversed(calls.values()):
        if call.is_norm and (found := factor(call.output, received)) is not None:
            return call, found
    raise InputError(f"{kind}: no norm's output is what the unembedding receives")


def transform_around(calls: dict[str, Call], norm: Call) -> Call | None:
    """Return the module of a Linear, an activation function and this norm, one after the other (BERT's head)."""
    around = [call for call in calls.values() if norm.path.startswith(f"{call.path}.")]
    # Innermost first.
    for call in sorted(around, key=lambda call: -call.path.count(".")):
        inside = [one for path, one in calls.items() if path.startswith(f"{call.path}.")]
        linears = [one for one in inside if is_linear(one.module)]
        if not torch.equal(call.output, norm.output) or len(linears) != 1:
            continue
        (dense,) = linears
        block = Block(call, inside)
        # Nothing but what the Linear returns: a block that ends with a norm adds its input to that.
        _, without = rerun(call, dense, torch.zeros_like, norm)
        alone = without is not None and not without.any()
        if alone and torch.equal(dense.first_input(), call.first_input()) and feeds(block, dense, norm):
            return call
    return None


def logit_scale(model: PreTrainedModel, calls: dict[str, Call], head: Call) -> tuple[float, float | None]:
    """Return the factor between the unembedding's output and the model's logits, and their cap (None: no cap).

    Raises InputError if something else happens to the logits.
    """
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    # The outermost module was called last.
    logits = next(reversed(calls.values())).output.double()
    uncapped = logits if cap is None else cap * torch.atanh(logits / cap)
    found = factor(head.output, uncapped)
    if found is None:
        raise InputError(f"{model.config.model_type}: logits are no multiple of the unembedding's output")
    return found, cap
