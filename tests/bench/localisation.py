"""Do the located neurons matter: `python -m tests.bench.localisation --model MODEL [--concepts 40]`.

For every method the K highest neurons of each concept are zeroed at all positions, and the concept's noun is read in
its own images, the other nouns in images without it: mean Δ log p in nats, with bootstrap intervals over concepts, and
their ratio. Neurons are ranked on DATA, and measured on images that no method has seen (`--fresh`). Each control zeroes
random neurons, as many in each layer as the method above it.

Concepts are cut into two halves by turns of the alphabet. Whatever a method was tuned on is in the half `tuned`; the
figures to quote are of the half `shown`.

    python -m tests.bench.localisation --model demo
    python -m tests.bench.localisation --model MODEL --concepts 44 --keep sums.npz       (10 minutes on two cores)
"""

from __future__ import annotations

from dataclasses import dataclass

SIZES = (10, 50, 100)
"""Neurons zeroed."""


@dataclass(frozen=True)
class Method:
    """One way of ranking: the score, whether the final norm is folded in, and the column that is sorted by."""

    score: str
    folded: bool = False
    by: str = "score"
    control: bool = False
    """Random neurons of the same layers are zeroed too."""


METHODS = {
    "random": Method("random"),
    "activation": Method("activation"),
    "gate (released code)": Method("gate"),
    "gradient (Schwettmann et al.)": Method("gradient"),
    "contribution": Method("contribution"),
    "contribution, folded": Method("contribution", True),
    "specific": Method("contribution", False, "specific"),
    "specific, folded": Method("contribution", True, "specific", control=True),
    "selective, folded": Method("contribution", True, "selective", control=True),
}
