"""Ask a model: greedy replies proven by one forward along a draft, and its states along given replies.

A greedy reply is the one along which each token, and the end behind it, is the model's likeliest. So one teacher-forced
forward proves a draft (the data's caption or answer; after an edit, the reply before it), and only where it fails is a
reply generated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.evaluation.asks import Ask, Reply
from mmray.models.capture import tap_input
from mmray.models.generation import generate
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.packing import Placed, alone, packed
from mmray.models.prompting import LONGEST
from mmray.neurons.scoring import forward

Result = TypeVar("Result")

RANKS = 10
"""Likeliest tokens that are compared rank by rank."""
CORRECTIONS = 2
"""Times that a failed draft is mended by the model's likeliest tokens along it, before a reply is generated."""
LOGITS_AT_ONCE = 2**23
"""Logits that are held at once, besides those of a forward."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
"""Difference allowed, in nats, between log-probabilities of a packed row and of one of its own, by number format."""
LIKELY = 10.0
"""Nats below which a token's log-probability is not compared."""
CHANGES_GREEDY = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
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


class AskError(Exception):
    """A prompt that the model can't be given."""

    def __init__(self, ask: Ask, reason: str) -> None:
        super().__init__(reason)
        self.ask = ask


def surviving(measured: Callable[[], Result], drop: Callable[[Ask, str], None]) -> Result:
    """Return what can be measured: what the model can't be given is dropped, one at a time."""
    while True:
        try:
            return measured()
        except AskError as error:
            drop(error.ask, str(error))


@dataclass(frozen=True, eq=False)
class States:
    """What a forward leaves of one ask: see `Reply`."""

    hidden: Float[Tensor, "place hidden"]
    top: Int[Tensor, "position rank"] | None


class Questioner:
    """Asks one model, `batch_size` images at a time."""

    def __init__(self, model: LoadedModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self._packs: bool | None = None

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return frozenset(self.model.tokenizer.all_special_ids)

    @cached_property
    def end(self) -> int:
        """The token that stands for the end of a reply, whichever the model writes there."""
        end = self.model.tokenizer.eos_token_id
        return int(end) if end is not None else min(self.special)

    def ended(self, likeliest: list[int]) -> list[int]:
        """Return the likeliest tokens along a reply with `end` at its end, if that is one of those that end it."""
        *tokens, last = likeliest
        return [*tokens, self.end if last in self.special else last]

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that have a logit."""
        return int(self.model.network.get_output_embeddings().weight.shape[0])

    @property
    def rows_at_once(self) -> int:
        """Places whose logits over the whole vocabulary are held at once."""
        return max(1, LOGITS_AT_ONCE // self.vocabulary)

    @cached_property
    def plain(self) -> bool:
        """Tell whether greedy generation takes the likeliest token at each step."""
        settings = self.model.network.generation_config
        return all(getattr(settings, name, None) in values for name, values in CHANGES_GREEDY.items())

    @torch.inference_mode()
    def replies(
        self, asks: Sequence[Ask], drafts: Sequence[list[int] | None], first: Sequence[States] | None = None
    ) -> list[Reply]:
        """Return the greedy replies; drafts are tried first, and mended twice where they fail.

        `first` are the states along the drafts, where they are known.
        """
        found: dict[int, Reply] = {}
        if self.plain:
            trial = {n: self.until_end(draft)[:LONGEST] for n, draft in enumerate(drafts) if draft is not None}
            known = {number: first[number] for number in trial} if first is not None else None
            for _ in range(1 + CORRECTIONS):
                trial = self._prove(asks, trial, found, known)
                known = None
            left = [number for number in range(len(asks)) if number not in found]
            written = self.write([asks[number] for number in left])
            self._prove(asks, dict(zip(left, written, strict=True)), found)
        left = [number for number in range(len(asks)) if number not in found]
        written = self.write_alone([asks[number] for number in left])
        states = self.along([asks[number] for number in left], written)
        for number, tokens, state in zip(left, written, states, strict=True):
            found[number] = Reply(tokens, self.text(tokens), state.hidden, state.top, steady=False)
        return [found[number] for number in range(len(asks))]

    def _prove(
        self,
        asks: Sequence[Ask],
        drafts: dict[int, list[int]],
        found: dict[int, Reply],
        known: dict[int, States] | None = None,
    ) -> dict[int, list[int]]:
        """Put down the drafts that are greedy replies, and return the others mended by what the model says of them."""
        if known is None:
            states = self.along([asks[number] for number in drafts], list(drafts.values()))
            known = dict(zip(drafts, states, strict=True))
        likeliest = self.likeliest([known[number].hidden for number in drafts])
        mended = {}
        for (number, draft), said in zip(drafts.items(), likeliest, strict=True):
            state, kept = known[number], agreeing(draft, said)
            if kept >= LONGEST or said[kept] in self.special:
                spare = len(draft) - kept
                hidden = state.hidden[: kept + 1]
                top = state.top[: len(state.top) - spare] if state.top is not None else None
                found[number] = Reply(draft[:kept], self.text(draft[:kept]), hidden, top, steady=True)
            else:
                mended[number] = self.until_end([*draft[:kept], *said[kept:]])[:LONGEST]
        return mended

    def until_end(self, tokens: list[int]) -> list[int]:
        """Return the tokens before the first that ends a reply."""
        stop = next((place for place, token in enumerate(tokens) if token in self.special), len(tokens))
        return tokens[:stop]

    def text(self, tokens: list[int]) -> str:
        """Return the text of a reply."""
        return str(self.model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).lstrip()

    def likeliest(self, hidden: Sequence[Float[Tensor, "place hidden"]]) -> list[list[int]]:
        """Return the likeliest tokens at these places."""
        if not hidden:
            return []
        rows = torch.cat(list(hidden))
        tokens = torch.cat([vocabulary_logits(self.model, part).argmax(dim=1) for part in rows.split(self.rows_at_once)])
        return [part.tolist() for part in tokens.cpu().split([len(part) for part in hidden])]

    @torch.inference_mode()
    def write(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Return the tokens that the model generates greedily."""
        return self._write(asks, self.batch_size)

    def write_alone(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Return what the model generates where a near tie may turn on what shares the batch: each by itself."""
        return self._write(asks, 1 if self.plain else self.batch_size)

    def _write(self, asks: Sequence[Ask], size: int) -> list[list[int]]:
        # Prompts of one length need no padding, which would shift their positions.
        groups: dict[object, list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            shape = ask.image.size if ask.image is not None else None
            groups[len(self.model.tokenizer(ask.prompt)["input_ids"]), shape].append(number)
        written: dict[int, list[int]] = {}
        for group in groups.values():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                images = [asks[number].image for number in part]
                written |= zip(part, generate(self.model, [asks[n].prompt for n in part], images), strict=True)
        return [written[number] for number in range(len(asks))]

    @torch.inference_mode()
    def along(self, asks: Sequence[Ask], replies: Sequence[list[int]]) -> list[States]:
        """Return the model's states along these replies, teacher-forced: at what predicts each token, and the end."""
        found: dict[int, States] = {}
        if self._packs is None:
            self._packs = self._proven(asks, replies)
        for groups in self._groups(asks, replies):
            self._run(asks, replies, groups, found)
        return [found[number] for number in range(len(asks))]

    def _groups(self, asks: Sequence[Ask], replies: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Yield batches: lists of rows, a row the asks that share it."""
        by_row: dict[object, list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            by_row[id(ask.image) if self._packs and ask.image is not None else -number].append(number)
        # Rows of like length share a batch.
        rows = sorted(
            by_row.values(),
            key=lambda row: (
                asks[row[0]].image is None,
                len(row) > 1,
                sum(len(asks[n].prompt) // 4 + len(replies[n]) for n in row),
            ),
        )
        start = 0
        while start < len(rows):
            stop = start + 1
            first = rows[start]
            while stop < min(len(rows), start + self.batch_size) and self._alike(asks, first, rows[stop]):
                stop += 1
            yield rows[start:stop]
            start = stop

    @staticmethod
    def _alike(asks: Sequence[Ask], first: list[int], other: list[int]) -> bool:
        with_image = (asks[first[0]].image is None) == (asks[other[0]].image is None)
        return with_image and (len(first) > 1) == (len(other) > 1)

    def _run(
        self, asks: Sequence[Ask], replies: Sequence[list[int]], rows: list[list[int]], found: dict[int, States]
    ) -> None:
        """Run one batch; where memory runs out or an ask can't be run, in halves, until the culprit is alone."""
        numbers = [number for row in rows for number in row]
        try:
            placed = self._placed(asks, replies, rows)
            states = self._states(placed)
            for number, row, positions in zip(numbers, placed.rows, placed.positions, strict=True):
                own = states[row, torch.tensor(positions, device=states.device)]
                top = self._top(own) if asks[number].whole else None
                found[number] = States(own[len(own) - len(replies[number]) - 1 :].clone(), top)
            return
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            problem = " ".join(str(error).split())[:500]
        if len(numbers) == 1:
            raise AskError(asks[numbers[0]], problem)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else [[[n]] for n in rows[0]]
        for half in halves:
            self._run(asks, replies, half, found)

    def _placed(self, asks: Sequence[Ask], replies: Sequence[list[int]], rows: list[list[int]]) -> Placed:
        if len(rows[0]) > 1:
            images = [image for row in rows if (image := asks[row[0]].image) is not None]
            prompts = [[asks[number].prompt for number in row] for row in rows]
            placed = packed(self.model, images, prompts, [[replies[number] for number in row] for row in rows])
            if placed is None:
                raise ValueError("prompts can't share a row")
            return placed
        numbers = [row[0] for row in rows]
        prompts_alone = [asks[number].prompt for number in numbers]
        return alone(self.model, prompts_alone, [asks[n].image for n in numbers], [replies[n] for n in numbers])

    def _states(self, placed: Placed) -> Float[Tensor, "row position hidden"]:
        final: list[Tensor] = []
        with tap_input(self.model.norm, final.append):
            forward(self.model, placed.batch)
        return final[-1].reshape(-1, placed.batch.positions, final[-1].shape[-1])

    def _top(self, states: Float[Tensor, "position hidden"]) -> Int[Tensor, "position rank"]:
        parts = [vocabulary_logits(self.model, part).topk(RANKS, dim=1).indices for part in states.split(self.rows_at_once)]
        return torch.cat(parts).to(torch.int32).cpu()

    def _proven(self, asks: Sequence[Ask], replies: Sequence[list[int]]) -> bool | None:
        """Tell whether prompts about one image may share a row: whether the model then says the same.

        None as long as no image has two asks.
        """
        by_image: dict[int, list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            if ask.image is not None:
                by_image[id(ask.image)].append(number)
        row = next((row for row in by_image.values() if len(row) > 1), None)
        if row is None:
            return None
        single: dict[int, States] = {}
        for number in row:
            self._run(asks, replies, [[number]], single)
        try:
            states = self._states(placed := self._placed(asks, replies, [row]))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
            return False
        worst = 0.0
        for number, positions in zip(row, placed.positions, strict=True):
            own = states[0, torch.tensor(positions[len(positions) - len(replies[number]) - 1 :], device=states.device)]
            shared = vocabulary_logits(self.model, own).log_softmax(dim=1)
            by_itself = vocabulary_logits(self.model, single[number].hidden).log_softmax(dim=1)
            likely = by_itself > -LIKELY
            worst = max(worst, float((shared - by_itself)[likely].abs().max()))
        return worst <= TOLERANCE[self.model.network.dtype]
