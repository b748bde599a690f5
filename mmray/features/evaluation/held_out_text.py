"""General text without an image, which no edit sees: the model's replies to prompts, and the perplexity of passages.

An edit of what is said about images should change neither. `held_out_text.json` has the texts, in several languages;
none of them is among those that editing keeps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mmray.data.samples import Failure
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.comparing import compare, log_likelihoods
from mmray.features.evaluation.draft_verifier import without_failures
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.measures import REPLY_LENGTHS
from mmray.features.evaluation.queries import Edit, Query
from mmray.models.prompting import prompt_text

TEXTS = Path(__file__).with_name("held_out_text.json")


@dataclass(frozen=True)
class HeldOutText:
    """A prompt to reply to, or a passage of plain text."""

    name: str
    language: str
    prompt: str
    """A question or an instruction; of a passage, its first sentence."""
    continuation: str | None = None
    """How a passage goes on, of which the perplexity is measured."""


def held_out_texts(count: int, seed: int) -> list[HeldOutText]:
    """Return `count` of the shipped prompts and of the passages, drawn at random, or all."""
    content: dict[str, Any] = json.loads(TEXTS.read_text(encoding="utf-8"))
    prompts = [
        HeldOutText(f"prompt {number}", language, text)
        for number, (language, text) in enumerate(chain(*content["prompts"].values()))
    ]
    passages = [
        HeldOutText(f"passage {number}", language, first, rest)
        for number, (language, first, rest) in enumerate(content["passages"])
    ]
    draw = random.Random(seed)
    return [text for some in (prompts, passages) for text in draw.sample(some, min(count, len(some)))]


def measure_held_out(
    baseline: BaselineReplies, edit: Edit, texts: Sequence[HeldOutText], is_about: Callable[[str, str], bool]
) -> MeasurementBuffer:
    """Return the measurements of held-out texts; one that the model can't run is a row in `errors`.

    `is_about(text, language)` says whether a text names an edited word: it is left out, because it may rightly change.
    """
    kept = {text.name: text for text in texts}
    failures: list[Failure] = []

    def drop(query: Query, reason: str) -> None:
        kept.pop(query.sample_id)
        failures.append(Failure(query.sample_id, "held-out text", "forward", reason))

    def measured() -> MeasurementBuffer:
        rows = MeasurementBuffer()
        _replies(rows, baseline, edit, [text for text in kept.values() if text.continuation is None], is_about)
        _perplexity(rows, baseline, edit, [text for text in kept.values() if text.continuation is not None], is_about)
        return rows

    rows = without_failures(measured, drop)
    rows.errors = [vars(failure) for failure in failures]
    return rows


def _replies(
    rows: MeasurementBuffer,
    baseline: BaselineReplies,
    edit: Edit,
    prompts: Sequence[HeldOutText],
    is_about: Callable[[str, str], bool],
) -> None:
    queries = [
        Query(text.name, prompt_text(baseline.model, text.prompt, text.language, image=False), None) for text in prompts
    ]
    verifier = baseline.text_verifier
    replies = baseline.replies(queries, [[] for _ in queries], verifier)
    found = [
        (query, reply)
        for text, query, reply in zip(prompts, queries, replies, strict=True)
        if not is_about(f"{text.prompt} {reply.text}", text.language)
    ]
    changes = compare(verifier, edit, [query for query, _ in found], [reply for _, reply in found])
    for (query, reply), change in zip(found, changes, strict=True):
        for length in REPLY_LENGTHS:
            if len(reply.tokens) <= length:
                rows.kept(f"text_only_{length}", query.sample_id, [change.same])
        positions = len(reply.hidden)
        # Per token: a long reply counts for more than a short one.
        rows.share("text_only_kl", query.sample_id, 0, change.kl * positions, positions)


def _perplexity(
    rows: MeasurementBuffer,
    baseline: BaselineReplies,
    edit: Edit,
    passages: Sequence[HeldOutText],
    is_about: Callable[[str, str], bool],
) -> None:
    some = [text for text in passages if not is_about(f"{text.prompt} {text.continuation}", text.language)]
    # Without a chat template: plain text is what a language model continues.
    queries = [Query(text.name, text.prompt, None) for text in some]
    replies = baseline.forced(queries, [text.continuation or "" for text in some])
    for query, reply, (before, after) in zip(
        queries, replies, log_likelihoods(baseline.text_verifier, edit, queries, replies), strict=True
    ):
        name, count = query.sample_id, len(reply.tokens)
        rows.add("perplexity", name, (-before, count), (-after, count))
        rows.add("perplexity_ratio", name, (0, count), (before - after, count))
