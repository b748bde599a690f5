"""Queries to a model, its replies, and how an edit changes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor


# A protocol, because a ban of words at decoding, the baseline of suppression, is evaluated like an edit.
class Edit(Protocol):
    """A change of a model that lasts as long as a `with` block."""

    @property
    def purposes(self) -> Sequence[Any]:
        """What it was made for, each a `Purpose` or like one; a sum of edits has those of each."""

    @property
    def facts(self) -> dict[str, Any]:
        """How it was made, and its cost."""

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """Return the block in which the model is changed."""


@dataclass(frozen=True, eq=False)
class Query:
    """One prompt, in the family's template, about one image or none."""

    sample_id: str
    prompt: str
    image: Image | None
    variant: str = ""
    """How the sample's image was changed; empty: not at all."""
    all_positions: bool = False
    """Record the ten likeliest tokens at every position, not only at those that predict the reply."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What the model's reply depends on."""
        return (self.sample_id, self.variant, self.prompt)


@runtime_checkable
class PromptEdit(Protocol):
    """A change of what the model is asked, such as a fact in its context; its weights stay."""

    def asked(self, query: Query) -> Query:
        """Return the query with the edit in its prompt."""
        ...


def queries_after(edit: Edit, queries: Sequence[Query]) -> list[Query]:
    """Return the queries as they are asked after an edit; one of the weights leaves them as they are."""
    return [edit.asked(query) for query in queries] if isinstance(edit, PromptEdit) else list(queries)


class QueryError(Exception):
    """The model can't run a query."""

    def __init__(self, query: Query, reason: str) -> None:
        super().__init__(reason)
        self.query = query


@dataclass(frozen=True, eq=False)
class States:
    """What is kept of one query's forward along a reply."""

    hidden: Float[Tensor, "token hidden"]
    """The final norm's input at the positions that predict the reply's tokens and its end."""
    activation: Float[Tensor, "token neuron"] | None = None
    """The input of the last MLP's output projection there; None: not available."""
    entered: Float[Tensor, "token hidden"] | None = None
    """What the last MLP's neurons read there, where `MlpInputs` knows the rows that read it."""
    top: Int[Tensor, "position rank"] | None = None
    """The ten likeliest tokens at every position of the sequence; None: not requested."""
    everywhere: States | None = None
    """These states at every position; None: not requested, or too large to keep."""

    @property
    def numbers(self) -> int:
        """How many numbers these states are."""
        return sum(one.numel() for one in (self.hidden, self.activation, self.entered) if one is not None)

    def at(self, index: Int[Tensor, " chosen"]) -> States:
        """Return a copy of the states at these positions alone."""
        hidden, activation, entered = (
            None if one is None else one[index.to(one.device)] for one in (self.hidden, self.activation, self.entered)
        )
        assert hidden is not None
        return States(hidden, activation, entered)

    def shortened(self, by: int) -> States:
        """Return the states without the last `by` positions of the reply."""
        # -0 would cut everything off; None cuts off nothing.
        some = slice(-by or None)
        return States(
            hidden=self.hidden[some],
            activation=None if self.activation is None else self.activation[some],
            entered=None if self.entered is None else self.entered[some],
            top=None if self.top is None else self.top[some],
            everywhere=self.everywhere and self.everywhere.shortened(by),
        )


@dataclass(frozen=True, eq=False)
class Reply:
    """The model's greedy reply, and its states along it."""

    tokens: list[int]
    text: str
    states: States
    verified: bool
    """Whether the likeliest tokens along the reply are the reply itself. They may differ in a near tie, and where
    generation settings penalise some tokens."""

    @property
    def hidden(self) -> Float[Tensor, "token hidden"]:
        """The final norm's input at the positions that predict the tokens and their end."""
        return self.states.hidden


@dataclass(frozen=True)
class TextChange:
    """One reply before and after an edit, or by the model alone and by another decoding."""

    before: str
    after: str

    @property
    def same(self) -> bool:
        """Return whether the reply is the same to the letter."""
        return self.before == self.after


@dataclass(frozen=True)
class Change(TextChange):
    """One greedy reply before and after an edit. Positions are those of the reply before it, its end included."""

    span: float
    """Share of positions with the same likeliest token, teacher-forced along the reply before."""
    greedy_span: float
    """Share of positions at which the two greedy replies have the same token."""
    kl: float
    """Mean KL(before ‖ after) over the positions, in nats."""
    top10: float | None
    """Share of equal (position, rank) slots of the ten likeliest tokens, over the whole sequence."""
    top1: float | None
    """The same of the likeliest token alone."""
