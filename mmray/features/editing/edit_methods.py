"""The registry of edit methods: what each changes, whether it can write a target, and its function. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias


@dataclass(frozen=True)
class EditMethod:
    """What a method does; its name is its key in EDIT_METHODS."""

    definition: str
    function: str
    """MODULE:FUNCTION, imported when an edit is made. It maps a `Task` to `Deltas`; a closed form maps `LayerRows` to
    what is added to them."""
    closed_form: bool = False
    """Computed from the rows of W_out alone. It only removes what neurons write, so it can't write a target."""


_METHODS, _CLOSED_FORM = "mmray.features.editing.methods", "mmray.features.editing.closed_form"
_PUBLISHED = "mmray.features.editing.published"

EDIT_METHODS: dict[str, EditMethod] = {
    "learned": EditMethod(
        "rows of the located neurons, by gradient descent, whitened by what kept answers use", f"{_METHODS}:learned"
    ),
    "null-space": EditMethod(
        "the same in directions that kept answers hardly use (as AlphaEdit)", f"{_METHODS}:null_space_of_kept"
    ),
    "plain": EditMethod("the same with every direction alike", f"{_METHODS}:plain"),
    "zero": EditMethod("the same rows set to zero", f"{_CLOSED_FORM}:zero", closed_form=True),
    "scale": EditMethod("the same rows times --factor", f"{_CLOSED_FORM}:scale", closed_form=True),
    "project": EditMethod(
        "the same rows without their part in the span of the word's unembeddings",
        f"{_CLOSED_FORM}:project",
        closed_form=True,
    ),
    "noise": EditMethod(
        "the published perturbation: Gaussian noise of --sigma on the same rows (Pan et al. 2024)",
        f"{_CLOSED_FORM}:noise",
        closed_form=True,
    ),
    "pan": EditMethod(
        "the published loss on the located neurons: target up, source down, L2 of the change (Pan et al. 2024)",
        f"{_PUBLISHED}:pan",
    ),
    "fine": EditMethod(
        "FiNE: five neurons per new token, of all layers but the last three, that write what the model says there "
        "(Pan et al. 2025)",
        f"{_PUBLISHED}:fine",
    ),
    "patch": EditMethod(
        "idle neurons of the last layer, rewritten to detect the word and to write another (Huang et al. 2023)",
        f"{_METHODS}:patch",
    ),
    "random": EditMethod("control: learned on random neurons of the same layers", f"{_METHODS}:random_neurons"),
    "activation": EditMethod("control: learned on the most active neurons", f"{_METHODS}:active_neurons"),
    "last-mlp": EditMethod("baseline: learned on the last MLP's whole W_out (FT-L)", f"{_METHODS}:last_mlp"),
    "rank-one": EditMethod("baseline: a rank-one change of the last W_out, as in ROME", f"{_METHODS}:rank_one_change"),
    "lora": EditMethod("baseline: LoRA on the last W_out (needs peft)", f"{_METHODS}:lora"),
}
"""By the name that `--method` takes."""

# A type checker can't read a Literal built from a dict; pydantic can, and names the choices in its errors.
if TYPE_CHECKING:
    Method: TypeAlias = str
else:
    Method = Literal[tuple(EDIT_METHODS)]
"""The name of a method, for settings."""


def methods_help() -> str:
    """Return the definition of every method, for the help of `--method`."""
    only = " (only to suppress)"
    definitions = (f"{name}: {method.definition}{only * method.closed_form}" for name, method in EDIT_METHODS.items())
    return f"How the rows of W_out are changed. {'; '.join(definitions)}"
