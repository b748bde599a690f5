"""Compute the states after an edit of the last layer from those before it, without a forward.

The final norm's input is a sum to which the last MLP adds Σ activation · row of W_out, and the activations don't depend
on these rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.editing.edit import WeightEdit
from mmray.features.evaluation.queries import Edit, States
from mmray.features.evaluation.teacher_forced_states import LIKELY, TOLERANCE, StateReader
from mmray.models.norms import vocabulary_logits
from mmray.models.parts import output_rows


@dataclass(frozen=True)
class LastLayer:
    """An edit of neurons of the last layer, made before the edit is applied."""

    reader: StateReader
    units: Int[Tensor, " unit"]
    rows: Float[Tensor, "unit hidden"]
    """Before the edit."""

    @classmethod
    def of(cls, reader: StateReader, edit: Edit) -> LastLayer | None:
        """Return an edit that changes the last layer alone; None for others."""
        model = reader.model
        projection = model.projections[-1]
        # A norm after the MLP is not linear in the rows, and experts hold activations per routed token.
        nonlinear = projection.experts or projection.post_norm is not None or not projection.ends_block
        if not isinstance(edit, WeightEdit) or nonlinear or not bool((edit.layer == len(model.widths) - 1).all()):
            return None
        rows = output_rows(model.network, projection)
        units = edit.unit.to(rows.device)
        # A copy, because the edit changes the weights in place.
        return cls(reader, units, rows[units].clone())

    @cached_property
    def added(self) -> Float[Tensor, "unit hidden"]:
        """What the edit, which must be applied now, has added to the rows, as rounded to the weights' number format."""
        model = self.reader.model
        rows = output_rows(model.network, model.projections[-1])[self.units]
        # Read back from the weights: in half precision they take less than the edit gives.
        return (rows.float() - self.rows.float()) * model.projections[-1].scale

    def after(self, before: States, all_positions: bool) -> States | None:
        """Return the states with the edit; None if those before it lack activations."""
        if before.activation is None or (all_positions and before.everywhere is None):
            return None
        top = self.reader.top(self._shifted(*before.everywhere)) if all_positions and before.everywhere else None
        return States(self._shifted(before.hidden, before.activation), top=top)

    def agrees(self, found: States, forward: States) -> bool:
        """Return whether states computed so are those of a forward, up to rounding."""
        ours, theirs = (
            vocabulary_logits(self.reader.model, states.hidden).log_softmax(dim=1) for states in (found, forward)
        )
        likely = theirs > theirs.amax(dim=1, keepdim=True) - LIKELY
        return float((ours - theirs)[likely].abs().max()) <= TOLERANCE[self.reader.model.network.dtype]

    def _shifted(
        self, hidden: Float[Tensor, "token hidden"], activation: Float[Tensor, "token neuron"]
    ) -> Float[Tensor, "token hidden"]:
        # In fp32 and rounded once: in half precision, many small changes could round away one by one.
        added = activation[:, self.units].float() @ self.added
        return (hidden.float() + added.to(hidden.device)).to(hidden.dtype)
