"""The registry of scores: definition, unit and cost of each. Needs no torch.

Options, help, `mmray plan` and the report derive from it. A score of one forward pass has its function in
`mmray.neurons.attribution`, one with a backward pass in `mmray.neurons.gradients`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

LOGITS = "logits before the final norm"
FOLDED = "logits after the final norm"


@dataclass(frozen=True)
class ScoreKind:
    """One score; its name is its key in SCORES."""

    definition: str
    unit: str = ""
    """Empty for a number without unit, such as an activation."""
    foldable: bool = False
    """Whether `--fold-norm` applies."""
    backward: bool = False
    """Whether it needs a backward pass per noun, in addition to the forward pass."""


SCORES: dict[str, ScoreKind] = {
    "contribution": ScoreKind(
        "activation × ⟨row of W_out, unembedding column of the token⟩: the neuron's exact additive share of the "
        "token's logit (Pan et al. 2024)",
        LOGITS,
        foldable=True,
    ),
    "gate": ScoreKind(
        "gate × ⟨row of W_out, unembedding column of the token⟩, as the authors' released code has it",
        LOGITS,
        foldable=True,
    ),
    "activation": ScoreKind("the activation alone, blind to the token"),
    "gradient": ScoreKind(
        "gradient of the token's logit × activation, summed over the image's positions (Schwettmann et al. 2023)",
        "logits",
        backward=True,
    ),
    "gradient-last": ScoreKind(
        "gradient of the token's logit × activation at the predicting position", "logits", backward=True
    ),
    "effect": ScoreKind(
        "estimate of what ablating the neuron alone takes from the token's log-odds: first order through all positions "
        "and later layers, and what its own write does to the final norm's scale",
        "log-odds",
        backward=True,
    ),
    "random": ScoreKind("drawn at random: a control"),
}
"""By the name that `--score` takes."""

# Type checkers can't evaluate the Literal below, which pydantic needs for its check.
if TYPE_CHECKING:
    Score: TypeAlias = str
else:
    Score = Literal[tuple(SCORES)]
"""The name of a score, for settings."""
Pieces = Literal["first", "sum"]
"""Which tokens of a noun with several are scored."""


def unit_of(score: str, *, folded: bool) -> str:
    """Return the unit of a score; empty if it has none."""
    return FOLDED if folded and SCORES[score].foldable else SCORES[score].unit


def scores_help() -> str:
    """Return the definition of every score, for the help of `--score`."""
    costly = " (a backward pass per noun)"
    return "What neurons are ranked by. " + "; ".join(
        f"{name}: {kind.definition}{costly * kind.backward}" for name, kind in SCORES.items()
    )
