"""The registry of methods that are compared: edits of neurons, fine-tuning, and a fact in context. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mmray.features.editing.edit_methods import EDIT_METHODS

_NEURONS, _OTHERS = "mmray.features.mmedit.record_edits", "mmray.features.mmedit"


@dataclass(frozen=True)
class Editor:
    """How a method edits a record; its name is its key in EDITORS."""

    definition: str
    function: str
    """MODULE:FUNCTION, imported when an edit is made. It maps a `Session` and a `RecordTask` to an edit."""


EDITORS: dict[str, Editor] = {
    **{
        name: Editor(method.definition, f"{_NEURONS}:edit_neurons")
        for name, method in EDIT_METHODS.items()
        if not method.closed_form
    },
    "ft-l": Editor(
        "the paper's baseline: all weights of the last decoder block, cross-entropy of the record alone",
        f"{_OTHERS}.fine_tuning:tune_last_block",
    ),
    "ft-v": Editor(
        "the paper's baseline: all weights of the projector or Q-Former, cross-entropy of the record alone",
        f"{_OTHERS}.fine_tuning:tune_vision_block",
    ),
    "ike": Editor(
        "the paper's baseline: the new fact stands in the prompt, without demonstrations; no weight changes",
        f"{_OTHERS}.in_context:state_fact",
    ),
}
"""By the name that `--methods` takes."""

LEFT_OUT = "KE, MEND and SERAC are left out: they need networks that are trained beforehand."
DEFAULT = ("learned", "pan", "fine", "random", "last-mlp", "rank-one", "ft-l", "ft-v", "ike")
"""Methods that are compared by default, in the order of the table."""
