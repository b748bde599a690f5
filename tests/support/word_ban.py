"""A word ban in decoding, evaluated like an edit: the baseline of suppression."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmray.features.editing.edit import Purpose
from mmray.models.bans import banned_tokens
from mmray.models.loading import LoadedModel


@dataclass(frozen=True, eq=False)
class WordBan:
    """Not an edit: generation may not write the words' tokens."""

    model: LoadedModel
    words: tuple[str, ...]
    purposes: tuple[Purpose, ...]
    facts: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "parameters_changed": 0})

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Ban the words in all that the model generates inside the block; weights and logits stay."""
        settings: Any = model.network.generation_config
        before = settings.bad_words_ids
        settings.bad_words_ids = banned_tokens(model, self.words)
        try:
            yield
        finally:
            settings.bad_words_ids = before
