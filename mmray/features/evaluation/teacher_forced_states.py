"""A model's states along given replies, teacher-forced; prompts about one image share a row if the model allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.errors import InputError
from mmray.features.evaluation.queries import Query, QueryError, States
from mmray.models.capture import capture_activations, capture_input
from mmray.models.linear import sizes
from mmray.models.loading import LoadedModel
from mmray.models.mlp_inputs import MlpInputs
from mmray.models.norms import vocabulary_logits
from mmray.models.packing import encode_shared
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import Batch, encode
from mmray.neurons.activation_cache import forward
from mmray.neurons.split_on_oom import FAILURES, free_memory, split_on_failure

RANKS = 10
"""Likeliest tokens that are compared rank by rank."""
# 32 MB in fp32.
LOGITS_AT_ONCE = 2**23
"""Logits that are held at once, on top of those of a forward."""
# 1 MB in fp32, which a unit keeps for each of its captions and text questions.
KEPT_NUMBERS = 2**18
"""Most numbers that are kept of one query at all of its positions."""
# Logits between 16 and 32 are 0.125 apart in bfloat16 and 0.016 in float16; a few such steps are allowed.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
"""Difference in nats between log-probabilities that counts as rounding, by number format."""
LIKELY = 10.0
"""Tokens less likely by more nats are not compared: their rounding errors are large and decide nothing."""


class StateReader:
    """Forwards of one model, `batch_size` rows at a time."""

    def __init__(self, model: LoadedModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.shares: bool | None = None
        """Whether prompts about one image may share a row; None: not tried yet."""

    @cached_property
    def vocabulary(self) -> int:
        """The number of tokens that have a logit."""
        return sizes(self.model.network.get_submodule(self.model.parts.unembedding))[1]

    @property
    def rows_at_once(self) -> int:
        """Positions whose logits over the vocabulary are held at once."""
        return max(1, LOGITS_AT_ONCE // self.vocabulary)

    @torch.inference_mode()
    def states_along(self, queries: Sequence[Query], replies: Sequence[list[int]]) -> list[States]:
        """Return the model's states along these replies, at the positions that predict each token and the end.

        Raises QueryError for a query that the model can't run.
        """
        found: dict[int, States] = {}
        if self.shares is None:
            # Tried out, because no configuration says whether an architecture accepts the mask of a packed row.
            self.shares = self._sharing_agrees(queries, replies)
        for rows in self._batches(queries, replies):
            found |= self._run(queries, replies, rows)
        return [found[number] for number in range(len(queries))]

    @torch.inference_mode()
    def likeliest(self, hidden: Sequence[Float[Tensor, "token hidden"]]) -> list[list[int]]:
        """Return the likeliest tokens at these positions."""
        if not hidden:
            return []
        rows = torch.split(torch.cat(list(hidden)), self.rows_at_once)
        tokens = torch.cat([vocabulary_logits(self.model, part).argmax(dim=1) for part in rows]).cpu()
        return [part.tolist() for part in torch.split(tokens, [len(part) for part in hidden])]

    def top(self, states: Float[Tensor, "position hidden"]) -> Int[Tensor, "position rank"]:
        """Return the ten likeliest tokens at these positions, the likeliest first."""
        parts = torch.split(states, self.rows_at_once)
        best = [vocabulary_logits(self.model, part).topk(RANKS, dim=1).indices for part in parts]
        return torch.cat(best).to(torch.int32).cpu()

    def _batches(self, queries: Sequence[Query], replies: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Yield batches of rows of one kind and similar length; a row lists the queries that share it."""

        def pixels(row: list[int]) -> int:
            return pixels_of(self.model, queries[row[0]].image)

        # Images are compared by identity: BaselineReplies decodes each once.
        by_row: dict[object, list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            # Minus the number for a row of its own: ids of objects are positive, so the two never collide.
            by_row[id(query.image) if self.shares and query.image is not None else -number].append(number)
        kinds: dict[tuple[bool, bool], list[list[int]]] = defaultdict(list)
        for row in by_row.values():
            kinds[queries[row[0]].image is None, len(row) > 1].append(row)
        for rows in kinds.values():
            # Similar lengths together, to save padding.
            rows.sort(key=lambda row: sum(len(queries[number].prompt) + len(replies[number]) for number in row))
            yield from within_budget(rows, pixels, BUDGET, self.batch_size)

    def _run(
        self, queries: Sequence[Query], replies: Sequence[list[int]], rows: Sequence[list[int]]
    ) -> dict[int, States]:
        """Forward one batch; after a failure, each half, down to single rows and then to single queries."""
        found: dict[int, States] = {}

        def alone(row: list[int], problem: str) -> None:
            if len(row) == 1:
                raise QueryError(queries[row[0]], " ".join(problem.split())[:500])
            free_memory()
            for number in row:
                found.update(self._run(queries, replies, [[number]]))

        for part in split_on_failure(rows, lambda some: self._read(queries, replies, some), alone):
            found |= part
        return found

    def _read(
        self, queries: Sequence[Query], replies: Sequence[list[int]], rows: Sequence[list[int]]
    ) -> dict[int, States]:
        numbers = [number for row in rows for number in row]
        batch = self._encoded(queries, replies, numbers, shared=len(rows[0]) > 1)
        final: list[Tensor] = []
        activations: list[Tensor] = []
        entered: list[Tensor] = []
        inputs = MlpInputs.of(self.model.network, self.model.projections[-1])
        with ExitStack() as stack:
            stack.enter_context(capture_input(self.model.norm, final.append))
            stack.enter_context(
                capture_activations(
                    self.model.network,
                    self.model.projections[-1:],
                    lambda _, activation, __: activations.append(activation),
                )
            )
            if inputs is not None:
                stack.enter_context(capture_input(inputs.reader, entered.append))
            forward(self.model, batch)
        # Mllama skips some blocks without an image, and routed experts see tokens, not positions.
        known = bool(activations) and not self.model.projections[-1].experts
        activation = activations[-1].flatten(0, -2) if known else None
        whole = States(final[-1].flatten(0, -2), activation, entered[-1].flatten(0, -2) if entered else None)
        found = {}
        for row, number in enumerate(numbers):
            length = batch.caption_start[row] + len(replies[number])
            index = torch.tensor([batch.flat(row, position) for position in range(length)])
            found[number] = self._kept(queries[number], whole.at(index), len(replies[number]))
        return found

    def _kept(self, query: Query, states: States, length: int) -> States:
        """Return what is kept of one query's states at all positions; `length` is that of the reply."""
        everywhere = query.all_positions and states.activation is not None and states.numbers <= KEPT_NUMBERS
        # Indexing copies: a view would keep the states of all positions in memory.
        last = torch.arange(len(states.hidden) - length - 1, len(states.hidden))
        return replace(
            states.at(last),
            top=self.top(states.hidden) if query.all_positions else None,
            everywhere=states if everywhere else None,
        )

    def _encoded(
        self, queries: Sequence[Query], replies: Sequence[list[int]], numbers: Sequence[int], *, shared: bool
    ) -> Batch:
        prompts, images = [queries[number].prompt for number in numbers], [queries[number].image for number in numbers]
        own = [replies[number] for number in numbers]
        offsets: list[list[tuple[int, int]]] = [[] for _ in numbers]
        if not shared:
            return encode(self.model, prompts, images, own, offsets)
        batch = encode_shared(self.model, prompts, [image for image in images if image is not None], own, offsets)
        if batch is None:
            raise ValueError("prompts can't share a row")
        return batch

    def _sharing_agrees(self, queries: Sequence[Query], replies: Sequence[list[int]]) -> bool | None:
        """Return whether the model's log-probabilities are the same if prompts about one image share a row.

        Tried on the first image with several queries; None if there is none.
        """
        by_image: dict[int, list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            if query.image is not None:
                by_image[id(query.image)].append(number)
        row = next((row for row in by_image.values() if len(row) > 1), None)
        if row is None:
            return None
        single: dict[int, States] = {}
        for number in row:
            single |= self._run(queries, replies, [[number]])
        try:
            shared = self._read(queries, replies, [row])
        except (InputError, *FAILURES):
            return False
        worst = 0.0
        for number in row:
            one = vocabulary_logits(self.model, single[number].hidden).log_softmax(dim=1)
            other = vocabulary_logits(self.model, shared[number].hidden).log_softmax(dim=1)
            worst = max(worst, float((one - other)[one > -LIKELY].abs().max()))
        return worst <= TOLERANCE[self.model.network.dtype]
