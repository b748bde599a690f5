"""States after an edit of the last layer alone, from those before it: nothing behind its neurons has to be run again.

The final norm's input is a sum, to which the last MLP adds Σ activation · row of W_out; and activations don't depend
on those rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.editing.edit import WeightEdit
from mmray.features.evaluation.queries import Edit, States
from mmray.features.evaluation.teacher_forced_states import TOLERANCE, StateReader
from mmray.models.norms import vocabulary_logits
from mmray.models.parts import output_rows


@dataclass(frozen=True)
class LastLayer:
    """An edit of neurons of the last layer, made before it is applied."""

    reader: StateReader
    units: Int[Tensor, " unit"]
    rows: Float[Tensor, "unit hidden"]
    """As they are before the edit."""

    @classmethod
    def of(cls, reader: StateReader, edit: Edit) -> LastLayer | None:
        """Return the edit as one of the last layer; None for others."""
        model = reader.model
        projection = model.projections[-1]
        apart = projection.experts or projection.post_norm is not None
        if not isinstance(edit, WeightEdit) or apart or not bool((edit.layer == len(model.widths) - 1).all()):
            return None
        rows = output_rows(model.network, projection)
        units = edit.unit.to(rows.device)
        return cls(reader, units, rows[units].clone())

    @cached_property
    def added(self) -> Float[Tensor, "unit hidden"]:
        """What the edit, which is applied now, has added to the rows, in the weights' number format."""
        model = self.reader.model
        rows = output_rows(model.network, model.projections[-1])[self.units]
        return (rows.float() - self.rows.float()) * model.projections[-1].scale

    def after(self, before: States, whole: bool) -> States | None:
        """Return the states with the edit; None where too little is known of those before it."""
        if before.activation is None or (whole and before.whole is None):
            return None
        top = self.reader.top(self._shifted(*before.whole)) if whole and before.whole is not None else None
        return States(self._shifted(before.hidden, before.activation), top=top)

    def agrees(self, found: States | None, proof: States) -> bool:
        """Return whether states found so are those of a forward."""
        assert found is not None
        ours, theirs = (
            vocabulary_logits(self.reader.model, states.hidden).log_softmax(dim=1) for states in (found, proof)
        )
        likely = theirs > theirs.amax(dim=1, keepdim=True) - 10
        return float((ours - theirs)[likely].abs().max()) <= TOLERANCE[self.reader.model.network.dtype]

    def _shifted(
        self, hidden: Float[Tensor, "place hidden"], activation: Float[Tensor, "place neuron"]
    ) -> Float[Tensor, "place hidden"]:
        written = activation[:, self.units].float() @ self.added
        return (hidden.float() + written.to(hidden.device)).to(hidden.dtype)
