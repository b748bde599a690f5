"""Ask a model: greedy replies, proven by one forward along a draft where there is one.

A greedy reply is the one along which each token, and the end behind it, is the model's likeliest. So one teacher-forced
forward proves a draft (the data's caption or answer; after an edit, the reply before it), and only where it fails is a
reply generated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch

from mmray.errors import InputError
from mmray.features.evaluation.queries import Query, QueryError, Reply, States
from mmray.features.evaluation.teacher_forced_states import StateReader
from mmray.models.generation import end_tokens, generate
from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons.split_on_oom import FAILURES

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
"""Settings of generation that make it write another than the likeliest token, and the values with which they don't."""


def agreeing(tokens: list[int], others: list[int]) -> int:
    """Return how many first tokens of the one are those of the other."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((place for place, (token, other) in pairs if token != other), min(len(tokens), len(others)))


def surviving(measured: Callable[[], Result], drop: Callable[[Query, str], None]) -> Result:
    """Return what can be measured: what the model can't be given is dropped, one at a time."""
    while True:
        try:
            return measured()
        except QueryError as error:
            drop(error.ask, str(error))


class DraftVerifier(StateReader):
    """Asks one model, `batch_size` images at a time, for replies of `longest` tokens at most."""

    def __init__(self, model: LoadedModel, batch_size: int, longest: int = LONGEST) -> None:
        super().__init__(model, batch_size)
        self.longest = longest

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return frozenset(end_tokens(self.model))

    @cached_property
    def end(self) -> int:
        """The token that stands for the end of a reply, whichever the model writes there."""
        end = self.model.tokenizer.eos_token_id
        return int(end) if end is not None else min(self.special)

    def ended(self, likeliest: list[int]) -> list[int]:
        """Return the likeliest tokens along a reply with `end` at its end, if that is one of those that end it."""
        *tokens, last = likeliest
        return [*tokens, self.end if last in self.special else last]

    @property
    def plain(self) -> bool:
        """Return whether greedy generation takes the likeliest token at each step, unless that is banned.

        What stands in for an edit may change the settings of generation: they are read each time.
        """
        settings = self.model.network.generation_config
        return all(getattr(settings, name, None) in values for name, values in CHANGES_GREEDY.items())

    @torch.inference_mode()
    def replies(
        self, asks: Sequence[Query], drafts: Sequence[Sequence[list[int]]], first: Sequence[States] | None = None
    ) -> list[Reply]:
        """Return the greedy replies; an ask's drafts are tried first, and corrected twice where they fail.

        `first` are the states along the drafts, one an ask, where they are known.
        """
        found: dict[int, Reply] = {}
        if self.plain:
            trial = [
                (number, self.until_end(draft)[: self.longest]) for number, some in enumerate(drafts) for draft in some
            ]
            for _ in range(1 + CORRECTIONS):
                trial, first = self._prove(asks, trial, found, first), None
            left = [number for number in range(len(asks)) if number not in found]
            written = self.write([asks[number] for number in left])
            self._prove(asks, list(zip(left, written, strict=True)), found)
        left = [number for number in range(len(asks)) if number not in found]
        written = self.write_alone([asks[number] for number in left])
        states = self.along([asks[number] for number in left], written)
        for number, tokens, state in zip(left, written, states, strict=True):
            found[number] = Reply(tokens, self.text(tokens), state, steady=False)
        return [found[number] for number in range(len(asks))]

    def _prove(
        self,
        asks: Sequence[Query],
        drafts: Sequence[tuple[int, list[int]]],
        found: dict[int, Reply],
        known: Sequence[States] | None = None,
    ) -> list[tuple[int, list[int]]]:
        """Put down the drafts that are greedy replies, and return one corrected draft of each other ask.

        A draft is corrected by the likeliest tokens along it, from the first that differs. Of several drafts it is the
        one that held longest.
        """
        states = known or self.along([asks[number] for number, _ in drafts], [draft for _, draft in drafts])
        corrected: dict[int, tuple[int, list[int]]] = {}
        for (number, draft), state, said in zip(
            drafts, states, self.likeliest([state.hidden for state in states]), strict=True
        ):
            kept = agreeing(draft, said)
            if self.banned(draft[:kept]):
                continue  # generation would have gone another way
            if kept >= self.longest or said[kept] in self.special:
                states_kept = state.shortened(len(draft) - kept)
                found[number] = Reply(draft[:kept], self.text(draft[:kept]), states_kept, steady=True)
            elif kept >= corrected.get(number, (-1, []))[0]:
                corrected[number] = kept, self.until_end([*draft[:kept], *said[kept:]])[: self.longest]
        return [(number, draft) for number, (_, draft) in corrected.items() if number not in found]

    def banned(self, tokens: list[int]) -> bool:
        """Return whether the settings of generation forbid what these tokens hold."""
        words: list[list[int]] = self.model.network.generation_config.bad_words_ids or []
        return any(tokens[at : at + len(word)] == word for word in words for at in range(len(tokens)))

    def until_end(self, tokens: list[int]) -> list[int]:
        """Return the tokens before the first that ends a reply, or that stands for an image, as a guess may have it."""
        ends = self.special | {self.model.parts.image_token_id}
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:stop]

    def text(self, tokens: list[int]) -> str:
        """Return the text of a reply."""
        return str(self.model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).lstrip()

    @torch.inference_mode()
    def write(self, asks: Sequence[Query]) -> list[list[int]]:
        """Return the tokens that the model generates greedily."""
        return self._write(asks, self.batch_size)

    def write_alone(self, asks: Sequence[Query]) -> list[list[int]]:
        """Return what the model generates where a near tie may turn on what shares the batch: each by itself."""
        return self._write(asks, 1 if self.plain else self.batch_size)

    def _write(self, asks: Sequence[Query], size: int) -> list[list[int]]:
        # Prompts of one length need no padding, which would shift their positions.
        groups: dict[object, list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            shape = ask.image.size if ask.image is not None else None
            groups[len(self.model.tokenizer(ask.prompt)["input_ids"]), shape].append(number)
        written: dict[int, list[int]] = {}
        for group in groups.values():
            for numbers in within_budget(group, lambda number: pixels_of(self.model, asks[number].image), BUDGET, size):
                self._generate(asks, numbers, written)
        return [written[number] for number in range(len(asks))]

    def _generate(self, asks: Sequence[Query], numbers: list[int], written: dict[int, list[int]]) -> None:
        """Generate one batch; where memory runs out or an ask can't be run, in halves, until the culprit is alone."""
        some = [asks[number] for number in numbers]
        try:
            tokens = generate(self.model, [ask.prompt for ask in some], [ask.image for ask in some], self.longest)
        except (InputError, *FAILURES) as error:
            problem = " ".join(str(error).split())[:500]
        else:
            written |= zip(numbers, tokens, strict=True)
            return
        if len(numbers) == 1:
            raise QueryError(some[0], problem)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._generate(asks, numbers[: len(numbers) // 2], written)
        self._generate(asks, numbers[len(numbers) // 2 :], written)
