"""Compute the states after an edit of the last layer from those before it, without a forward.

The final norm's input is a sum to which the last MLP adds Σ activation · row of W_out. The activations don't depend on
these rows. Those of neurons that read something else after the edit follow from what they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.editing.edit import WeightEdit
from mmray.features.evaluation.queries import Edit, States
from mmray.features.evaluation.teacher_forced_states import LIKELY, TOLERANCE, StateReader
from mmray.models.mlp_inputs import MlpInputs
from mmray.models.norms import vocabulary_logits
from mmray.models.parts import output_rows


@dataclass(frozen=True)
class LastLayer:
    """An edit of neurons of the last layer, made before the edit is applied."""

    reader: StateReader
    units: Int[Tensor, " unit"]
    rows: Float[Tensor, "unit hidden"]
    """Before the edit."""
    inputs: MlpInputs | None
    """Of an edit that changes what neurons read."""

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
        inputs = None if edit.inputs is None else MlpInputs.of(model.network, projection)
        # A copy, because the edit changes the weights in place.
        return cls(reader, units, rows[units].clone(), inputs)

    @cached_property
    def edited(self) -> Float[Tensor, "unit hidden"]:
        """The rows after the edit, which must be applied now, as rounded to the weights' number format."""
        # Read back from the weights: in half precision they take less than the edit gives.
        return output_rows(self.reader.model.network, self.reader.model.projections[-1])[self.units].float()

    def after(self, before: States, all_positions: bool) -> States | None:
        """Return the states with the edit; None if those before it lack activations."""
        hidden = self._shifted(before)
        everywhere = self._shifted(before.everywhere) if all_positions and before.everywhere else None
        if hidden is None or (all_positions and everywhere is None):
            return None
        return States(hidden, top=None if everywhere is None else self.reader.top(everywhere))

    def agrees(self, found: States, forward: States) -> bool:
        """Return whether states computed so are those of a forward, up to rounding."""
        ours, theirs = (
            vocabulary_logits(self.reader.model, states.hidden).log_softmax(dim=1) for states in (found, forward)
        )
        likely = theirs > theirs.amax(dim=1, keepdim=True) - LIKELY
        return float((ours - theirs)[likely].abs().max()) <= TOLERANCE[self.reader.model.network.dtype]

    def _shifted(self, before: States) -> Float[Tensor, "token hidden"] | None:
        if before.activation is None or (self.inputs is not None and before.entered is None):
            return None
        activation = before.activation[:, self.units].float()
        # In fp32 and rounded once: in half precision, many small changes could round away one by one.
        added = activation @ (self.edited - self.rows.float())
        if self.inputs is not None and before.entered is not None:
            now = self.inputs.activation(before.entered, self.inputs.rows(self.units), self.inputs.biases(self.units))
            added = added + (now - activation) @ self.edited
        added = added * self.reader.model.projections[-1].scale
        return (before.hidden.float() + added.to(before.hidden.device)).to(before.hidden.dtype)
