"""Greedy replies of a model, verified by one forward along a draft where possible (as in speculative decoding).

A reply is greedy if each of its tokens, and its end, is the model's likeliest along it. So one teacher-forced forward
verifies a draft: the data's caption or answer, or after an edit the reply before it. Only if that fails is a reply
generated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch

from mmray.features.evaluation.queries import Query, QueryError, Reply, States
from mmray.features.evaluation.teacher_forced_states import StateReader
from mmray.models.decodings import GREEDY, Decoding
from mmray.models.generation import end_tokens, generate
from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons.split_on_oom import split_on_failure

Result = TypeVar("Result")

CORRECTIONS = 2
"""Times that a failed draft is corrected by the model's likeliest tokens along it, before a reply is generated."""
CHANGES_GREEDY: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
}
"""Generation settings that make the model write another than the likeliest token, and the values that do not."""


def common_prefix(tokens: list[int], others: list[int]) -> int:
    """Return how many first tokens the two have in common."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((place for place, (token, other) in pairs if token != other), min(len(tokens), len(others)))


def without_failures(measure: Callable[[], Result], drop: Callable[[Query, str], None]) -> Result:
    """Return what is measured, after dropping one by one the queries that the model can't run."""
    while True:
        try:
            return measure()
        except QueryError as error:
            drop(error.query, str(error))


class DraftVerifier(StateReader):
    """Queries one model, `batch_size` images at a time, for replies of at most `longest` tokens."""

    def __init__(self, model: LoadedModel, batch_size: int, longest: int = LONGEST) -> None:
        super().__init__(model, batch_size)
        self.longest = longest

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return frozenset(end_tokens(self.model))

    @cached_property
    def end(self) -> int:
        """The token that represents the end of a reply, whichever of `ends` the model writes."""
        end = self.model.tokenizer.eos_token_id
        return int(end) if end is not None else min(self.ends)

    def ended(self, likeliest: list[int]) -> list[int]:
        """Return the likeliest tokens along a reply, with `end` in place of a last one that ends it."""
        *tokens, last = likeliest
        return [*tokens, self.end if last in self.ends else last]

    @property
    def plain(self) -> bool:
        """Whether greedy generation takes the likeliest token at each step, unless that is banned."""
        # Not cached: a word ban, evaluated like an edit, changes the generation settings.
        settings = self.model.network.generation_config
        return all(getattr(settings, name, None) in values for name, values in CHANGES_GREEDY.items())

    @torch.inference_mode()
    def replies(
        self,
        queries: Sequence[Query],
        drafts: Sequence[Sequence[list[int]]],
        first_states: Sequence[States] | None = None,
    ) -> list[Reply]:
        """Return the greedy replies; a query's drafts are tried first, and corrected twice if they fail.

        `first_states` are the states along the drafts, one per query, if they are known.
        """
        found: dict[int, Reply] = {}
        if self.plain:
            trial = [
                (number, self.until_end(draft)[: self.longest]) for number, some in enumerate(drafts) for draft in some
            ]
            # Known states are of the first drafts only; corrected drafts need a forward.
            for _ in range(1 + CORRECTIONS):
                trial, first_states = self._verify(queries, trial, found, first_states), None
            left = [number for number in range(len(queries)) if number not in found]
            generated = self._generate([queries[number] for number in left], self.batch_size, padded=True)
            self._verify(queries, list(zip(left, generated, strict=True)), found)
        # What generation in batches and a forward disagree on is a near tie: it is generated again without a batch.
        left = [number for number in range(len(queries)) if number not in found]
        generated = self.generate_alone([queries[number] for number in left])
        states = self.states_along([queries[number] for number in left], generated)
        for number, tokens, state in zip(left, generated, states, strict=True):
            found[number] = Reply(tokens, self.text(tokens), state, verified=False)
        return [found[number] for number in range(len(queries))]

    def _verify(
        self,
        queries: Sequence[Query],
        drafts: Sequence[tuple[int, list[int]]],
        found: dict[int, Reply],
        known: Sequence[States] | None = None,
    ) -> list[tuple[int, list[int]]]:
        """Add the drafts that are greedy replies to `found`, and return one corrected draft of each other query.

        A draft is corrected by the likeliest tokens along it, from the first that differs. Of several drafts, the one
        with the longest correct prefix is kept.
        """
        states = known or self.states_along([queries[number] for number, _ in drafts], [draft for _, draft in drafts])
        corrected: dict[int, tuple[int, list[int]]] = {}
        for (number, draft), state, likeliest in zip(
            drafts, states, self.likeliest([state.hidden for state in states]), strict=True
        ):
            kept = common_prefix(draft, likeliest)
            if self.banned(draft[:kept]):
                continue  # generation would have gone another way
            # Never out of range: the likeliest tokens have one more than the draft, the one that follows it.
            if kept >= self.longest or likeliest[kept] in self.ends:
                states_kept = state.shortened(len(draft) - kept)
                found[number] = Reply(draft[:kept], self.text(draft[:kept]), states_kept, verified=True)
            elif kept >= corrected.get(number, (-1, []))[0]:
                corrected[number] = kept, self.until_end([*draft[:kept], *likeliest[kept:]])[: self.longest]
        # One of several drafts may have been verified after another one of the same query failed.
        return [(number, draft) for number, (_, draft) in corrected.items() if number not in found]

    def banned(self, tokens: list[int]) -> bool:
        """Return whether these tokens hold a word that the generation settings ban."""
        words: list[list[int]] = self.model.network.generation_config.bad_words_ids or []
        return any(tokens[at : at + len(word)] == word for word in words for at in range(len(tokens)))

    def until_end(self, tokens: list[int]) -> list[int]:
        """Return the tokens before the first that ends a reply or stands for an image, as a draft may contain."""
        stops = self.ends | {self.model.parts.image_token_id}
        stop = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        return tokens[:stop]

    def text(self, tokens: list[int]) -> str:
        """Return the text of a reply."""
        # No clean-up: it removes blanks before punctuation, and replies are compared to the letter.
        return str(self.model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).lstrip()

    @torch.inference_mode()
    def generate(self, queries: Sequence[Query], decoding: Decoding = GREEDY) -> list[list[int]]:
        """Return the tokens that the model generates greedily, or by another decoding."""
        return self._generate(queries, self.batch_size, decoding)

    def generate_alone(self, queries: Sequence[Query]) -> list[list[int]]:
        """Return what the model generates for each query by itself: what shares a batch may decide a near tie."""
        # If not plain, every reply is generated here: one by one, that would take too long.
        return self._generate(queries, 1 if self.plain else self.batch_size)

    def _generate(
        self, queries: Sequence[Query], size: int, decoding: Decoding = GREEDY, *, padded: bool = False
    ) -> list[list[int]]:
        """Return the tokens that the model generates; only what is verified afterwards may share a batch `padded`."""
        lengths = [len(self.model.tokenizer(query.prompt)["input_ids"]) for query in queries]
        groups: dict[object, list[int]] = defaultdict(list)
        # By length, to save padding.
        for number in sorted(range(len(queries)), key=lengths.__getitem__):
            image = queries[number].image
            # Images of one size have equally many image tokens, which the prompt's own tokens don't count.
            shape = image.size if image is not None else None
            # Prompts of one length need no padding, which can decide a near tie.
            groups[shape if padded else (lengths[number], shape)].append(number)
        found: dict[int, list[int]] = {}

        def generate_batch(numbers: Sequence[int]) -> None:
            some = [queries[number] for number in numbers]
            prompts, images = [one.prompt for one in some], [one.image for one in some]
            tokens = generate(self.model, prompts, images, self.longest, decoding)
            found.update(zip(numbers, tokens, strict=True))

        def alone(number: int, problem: str) -> None:
            raise QueryError(queries[number], " ".join(problem.split())[:500])

        def pixels(number: int) -> int:
            return pixels_of(self.model, queries[number].image)

        for group in groups.values():
            for numbers in within_budget(group, pixels, BUDGET, size):
                split_on_failure(numbers, generate_batch, alone)
        return [found[number] for number in range(len(queries))]
