"""In-context editing (IKE, Zheng et al. 2023): the new fact stands before every prompt, and no weight changes.

MMEdit puts up to 32 demonstrations of a training split before the fact. Here there are none, so that no record leaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mmray.features.evaluation.queries import Query
from mmray.features.mmedit.record_edits import PreparedRecord, Session
from mmray.models.loading import LoadedModel
from mmray.models.prompting import prompt_text

FACT, QUESTION = "New Fact: {question} {answer}\n", "Prompt: "
"""As MMEdit's code writes them."""
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class FactInContext:
    """Facts that stand before every question."""

    model: LoadedModel
    statement: str
    facts: dict[str, Any] = field(default_factory=lambda: {"parameters_changed": 0, "norm": 0.0, "seconds": 0.0})
    purposes: tuple[Any, ...] = ()

    @contextmanager
    def applied(self, _: LoadedModel) -> Iterator[None]:
        """Change nothing."""
        yield

    def asked(self, query: Query) -> Query:
        """Return the query with the facts before its question."""
        # The prompt is templated already, and facts belong inside, where the user's own words begin.
        head, end = self._frames[query.image is not None]
        question = query.prompt.removeprefix(head).removesuffix(end)
        return replace(query, prompt=f"{head}{self.statement}{QUESTION}{question}{end}")

    @cached_property
    def _frames(self) -> dict[bool, tuple[str, str]]:
        """What the model's template puts before and after a question, with and without an image."""
        # No template changes this character, so that what stands around it is the frame.
        texts = {image: prompt_text(self.model, MARK, "en", image=image) for image in (True, False)}
        return {image: (text.partition(MARK)[0], text.partition(MARK)[2]) for image, text in texts.items()}


def state_fact(session: Session, prepared: PreparedRecord, _: str) -> FactInContext:
    """State the record's answer."""
    record = prepared.record
    return FactInContext(session.model, FACT.format(question=record.question, answer=record.target))
