"""What the model is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor


class EditPurpose(Protocol):
    """What an edit was made for."""

    @property
    def kind(self) -> str:
        """One of swap, suppress, hallucination, noise."""

    @property
    def source(self) -> str | None:
        """The concept that is to vanish."""

    @property
    def target(self) -> str | None:
        """The concept or word that is to be named in its place."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of a context and the word that is hallucinated in it."""

    @property
    def language(self) -> str | None:
        """The language of the captions that the edit was made on."""

    @property
    def samples(self) -> tuple[str, ...]:
        """Identifiers of the samples that the edit was made on."""

    @property
    def images(self) -> tuple[str, ...]:
        """Digests of the images that the edit was made on; none of an edit that did not record them."""


class Edit(Protocol):
    """A change of a model that lasts as long as a `with` block."""

    @property
    def purposes(self) -> Sequence[Any]:
        """What it was made for, each a `EditPurpose`; of several edits in one, that of each."""

    @property
    def facts(self) -> dict[str, Any]:
        """How it was made, and what it cost."""

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """Return the block in which the model is changed."""


@dataclass(frozen=True, eq=False)
class Query:
    """One prompt, in the family's template, about one image or about none.

    `variant` says what was done to the sample's image: as it is (an empty text), flipped, cropped, or none shown.
    `whole`: the ten likeliest tokens of every position are wanted, not only of those that predict the reply.
    """

    sample_id: str
    prompt: str
    image: Image | None
    variant: str = ""
    whole: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """What the model's reply depends on."""
        return (self.sample_id, self.variant, self.prompt)


class QueryError(Exception):
    """A prompt that the model can't be given."""

    def __init__(self, ask: Query, reason: str) -> None:
        super().__init__(reason)
        self.ask = ask


@dataclass(frozen=True, eq=False)
class States:
    """What a forward along a reply leaves of one ask.

    `hidden` is the input of the final norm at the places that predict the reply's tokens and its end, `activation` that
    of the last MLP's output projection there; `top` the ten likeliest tokens at every position of the sequence, and
    `whole` hidden states and activations there. None: not asked for, or too large to keep.
    """

    hidden: Float[Tensor, "place hidden"]
    activation: Float[Tensor, "place neuron"] | None = None
    top: Int[Tensor, "position rank"] | None = None
    whole: tuple[Float[Tensor, "position hidden"], Float[Tensor, "position neuron"]] | None = None

    def shortened(self, by: int) -> States:
        """Return the states without the last places of the reply."""
        return States(
            hidden=self.hidden[: len(self.hidden) - by],
            activation=None if self.activation is None else self.activation[: len(self.activation) - by],
            top=None if self.top is None else self.top[: len(self.top) - by],
            whole=None if self.whole is None else (self.whole[0][: -by or None], self.whole[1][: -by or None]),
        )


@dataclass(frozen=True, eq=False)
class Reply:
    """What the model writes greedily, and its states along it.

    `steady` is false where the likeliest tokens along the reply are not those that generation wrote: a near tie, or a
    model whose settings penalise some tokens.
    """

    tokens: list[int]
    text: str
    states: States
    steady: bool

    @property
    def hidden(self) -> Float[Tensor, "place hidden"]:
        """The input of the final norm at the places that predict the tokens and their end."""
        return self.states.hidden


@dataclass(frozen=True)
class Change:
    """One reply before and after an edit.

    `span` is the share of the reply's places (its end included) where the likeliest token is the same, teacher-forced;
    `greedy_span` the share of places where the two greedy replies have the same token; `divergence` the mean of
    KL(before ‖ after) over the reply's places, in nats; `ranks` the share of equal (position, rank) slots of the ten
    likeliest tokens over the whole sequence; `firsts` that of the likeliest alone.
    """

    before: str
    after: str
    span: float
    greedy_span: float
    divergence: float
    ranks: float | None
    firsts: float | None

    @property
    def same(self) -> bool:
        """Return whether the greedy reply is the same to the letter."""
        return self.before == self.after


def chunks(costs: list[int], most: int) -> Iterator[slice]:
    """Yield slices of neighbours whose costs add up to `most` at most, or one alone that costs more."""
    start, total = 0, 0
    for index, cost in enumerate(costs):
        if index > start and total + cost > most:
            yield slice(start, index)
            start, total = index, 0
        total += cost
    if start < len(costs):
        yield slice(start, len(costs))
