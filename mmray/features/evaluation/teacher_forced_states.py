"""A model's states along given replies, teacher-forced; prompts about one image share a row where the model allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.errors import InputError
from mmray.features.evaluation.queries import Query, QueryError, States
from mmray.models.capture import capture_activations, capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.packing import PackedBatch, shared_prefix, unshared
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons.activation_cache import forward
from mmray.neurons.split_on_oom import FAILURES

RANKS = 10
"""Likeliest tokens that are compared rank by rank."""
LOGITS_AT_ONCE = 2**23
"""Logits that are held at once, on top of those of a forward."""
KEPT_NUMBERS = 2**18
"""Numbers that are kept of one ask for the whole of its sequence, at most."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
"""Difference allowed, in nats, between log-probabilities of a shared row and of one of its own, by number format."""
LIKELY = 10.0
"""Nats below which a token's log-probability is not compared."""


class StateReader:
    """Runs one model, `batch_size` rows at a time."""

    def __init__(self, model: LoadedModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.shares: bool | None = None
        """Whether prompts about one image may share a row; None: not tried yet."""

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that have a logit."""
        return int(self.model.network.get_output_embeddings().weight.shape[0])

    @property
    def rows_at_once(self) -> int:
        """Places whose logits over the whole vocabulary are held at once."""
        return max(1, LOGITS_AT_ONCE // self.vocabulary)

    @torch.inference_mode()
    def along(self, asks: Sequence[Query], replies: Sequence[list[int]]) -> list[States]:
        """Return the model's states along these replies: at what predicts each token, and the end.

        Raises AskError for an ask that the model can't be given.
        """
        found: dict[int, States] = {}
        if self.shares is None:
            self.shares = self._proven(asks, replies)
        for rows in self._batches(asks, replies):
            self._run(asks, replies, rows, found)
        return [found[number] for number in range(len(asks))]

    @torch.inference_mode()
    def likeliest(self, hidden: Sequence[Float[Tensor, "place hidden"]]) -> list[list[int]]:
        """Return the likeliest tokens at these places."""
        if not hidden:
            return []
        rows = torch.split(torch.cat(list(hidden)), self.rows_at_once)
        said = torch.cat([vocabulary_logits(self.model, part).argmax(dim=1) for part in rows]).cpu()
        return [part.tolist() for part in torch.split(said, [len(part) for part in hidden])]

    def _batches(self, asks: Sequence[Query], replies: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Yield batches: lists of rows, a row the asks that share it. Rows of one kind and like length go together."""

        def pixels(row: list[int]) -> int:
            return pixels_of(self.model, asks[row[0]].image)

        by_row: dict[object, list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            by_row[id(ask.image) if self.shares and ask.image is not None else -number].append(number)
        kinds: dict[tuple[bool, bool], list[list[int]]] = defaultdict(list)
        for row in by_row.values():
            kinds[asks[row[0]].image is None, len(row) > 1].append(row)
        for rows in kinds.values():
            rows.sort(key=lambda row: sum(len(asks[number].prompt) + len(replies[number]) for number in row))
            yield from within_budget(rows, pixels, BUDGET, self.batch_size)

    def _run(
        self, asks: Sequence[Query], replies: Sequence[list[int]], rows: list[list[int]], found: dict[int, States]
    ) -> None:
        """Run one batch; where memory runs out or an ask can't be run, in halves, until the culprit is alone."""
        try:
            found |= self._read(asks, replies, rows)
            return
        except (InputError, *FAILURES) as error:
            # Only the message leaves this block: the error holds the frames, and so the memory, of the failed forward.
            problem = " ".join(str(error).split())[:500]
        if len(rows) == len(rows[0]) == 1:
            raise QueryError(asks[rows[0][0]], problem)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else [[[n]] for n in rows[0]]
        for half in halves:
            self._run(asks, replies, half, found)

    def _read(self, asks: Sequence[Query], replies: Sequence[list[int]], rows: list[list[int]]) -> dict[int, States]:
        numbers = [number for row in rows for number in row]
        placed = self._placed(asks, replies, rows)
        final: list[Tensor] = []
        written: list[Tensor] = []
        with (
            capture_input(self.model.norm, final.append),
            capture_activations(
                self.model.network, self.model.projections[-1:], lambda _, activation, __: written.append(activation)
            ),
        ):
            forward(self.model, placed.batch)
        states = final[-1].reshape(-1, placed.batch.positions, final[-1].shape[-1])
        # Without an image Mllama leaves out some blocks; of routed experts, rows are not the positions.
        told = bool(written) and not self.model.projections[-1].experts
        activations = written[-1].reshape(*states.shape[:2], -1) if told else None
        return {
            number: self._of(asks[number], len(replies[number]), states[row], activations, row, positions)
            for number, row, positions in zip(numbers, placed.rows, placed.positions, strict=True)
        }

    def _of(
        self,
        ask: Query,
        length: int,
        states: Float[Tensor, "position hidden"],
        activations: Float[Tensor, "row position neuron"] | None,
        row: int,
        positions: list[int],
    ) -> States:
        """Return what is kept of one ask."""
        index = torch.tensor(positions, device=states.device)
        own, last = states[index], slice(len(positions) - length - 1, None)
        activation = None if activations is None else activations[row, index.to(activations.device)]
        small = activation is not None and own.numel() + activation.numel() <= KEPT_NUMBERS
        return States(
            hidden=own[last].clone(),
            activation=None if activation is None else activation[last].clone(),
            top=self.top(own) if ask.whole else None,
            whole=(own, activation) if ask.whole and small and activation is not None else None,
        )

    def _placed(self, asks: Sequence[Query], replies: Sequence[list[int]], rows: list[list[int]]) -> PackedBatch:
        if len(rows[0]) > 1:
            images = [image for row in rows if (image := asks[row[0]].image) is not None]
            prompts = [[asks[number].prompt for number in row] for row in rows]
            placed = shared_prefix(self.model, images, prompts, [[replies[number] for number in row] for row in rows])
            if placed is None:
                raise ValueError("prompts can't share a row")
            return placed
        numbers = [row[0] for row in rows]
        alike = [asks[number] for number in numbers]
        images_alone = [ask.image for ask in alike]
        return unshared(self.model, [ask.prompt for ask in alike], images_alone, [replies[n] for n in numbers])

    def top(self, states: Float[Tensor, "position hidden"]) -> Int[Tensor, "position rank"]:
        """Return the likeliest tokens at these positions, the likeliest first."""
        parts = torch.split(states, self.rows_at_once)
        best = [vocabulary_logits(self.model, part).topk(RANKS, dim=1).indices for part in parts]
        return torch.cat(best).to(torch.int32).cpu()

    def _proven(self, asks: Sequence[Query], replies: Sequence[list[int]]) -> bool | None:
        """Return whether prompts about one image may share a row: whether the model then says the same.

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
            shared = self._read(asks, replies, [row])
        except (InputError, *FAILURES):
            return False
        worst = 0.0
        for number in row:
            one = vocabulary_logits(self.model, single[number].hidden).log_softmax(dim=1)
            other = vocabulary_logits(self.model, shared[number].hidden).log_softmax(dim=1)
            worst = max(worst, float((one - other)[one > -LIKELY].abs().max()))
        return worst <= TOLERANCE[self.model.network.dtype]
