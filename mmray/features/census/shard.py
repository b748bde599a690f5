"""The analysis of one shard, a function of settings and samples: decode ahead, run in batches, score, reduce."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, groupby, pairwise
from typing import TypeAlias, TypeVar

import pyarrow as pa
import torch
from PIL.Image import Image

from mmray.data.images import decode_image
from mmray.data.samples import Failure, Sample
from mmray.engine.clock import phase
from mmray.features.census.occurrences import occurrence_table
from mmray.features.census.reduction import ConceptSums, candidates_kept, sums_memory
from mmray.features.census.settings import CensusSettings
from mmray.features.census.tables import PARTS
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.packing import encode_shared
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import POSITIONS, Batch, TokenSpan, encode, prefix_before, prompt_text, tokenize_captions
from mmray.models.windows import window_of, windows
from mmray.neurons.concepts import Mention, NounSource
from mmray.neurons.module_activity import ModuleActivity
from mmray.neurons.row_sharing import RowSharing
from mmray.neurons.scores import SCORES
from mmray.neurons.scoring import Scored, non_finite_rows, score_batch, whole_nouns
from mmray.neurons.split_on_oom import FAILURES, FREED, free_memory, heap_kept, split_on_failure, trim_heap
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition, positions_of


@dataclass(frozen=True)
class Captioned:
    """A sample with the caption to score, its nouns, and its tokens as they follow the prompt."""

    sample: Sample
    prompt: str
    caption: str
    mentions: list[Mention]
    tokens: list[int]
    offsets: list[tuple[int, int]]


IMAGE_BYTES = 512 << 20
"""Encoded bytes of images held at once; a larger shard is analysed in parts."""

NO_NOUN = "no noun"
"""Why a sample is skipped: its caption has no noun to rank neurons for. Tables that need no noun still include it."""

Item = TypeVar("Item")
Encoded: TypeAlias = tuple[list[Captioned], Batch]


class ShardAnalysis:
    """Collects the tables of one shard, and how many of its samples were skipped, by reason."""

    def __init__(
        self,
        model: LoadedModel,
        settings: CensusSettings,
        nouns: NounSource,
        shard_id: int,
        sharing: RowSharing | None = None,
    ) -> None:
        """Analyse a shard. With `sharing`, captions of one image share a row where the model allows it."""
        self.model = model
        self.settings = settings
        self.nouns = nouns
        self.shard_id = shard_id
        # Backward passes sum over the positions of rows.
        self.sharing = None if SCORES[settings.score].backward else sharing
        kept = candidates_kept(settings.candidates, sum(model.widths))
        self.sums = ConceptSums(model.widths, kept, sums_memory(model.device))
        self.statistics = TokenStatistics(model.widths)
        self.module = ModuleActivity(model, settings.module)
        self.prompts: dict[tuple[str | None, str | None, bool, str | None], str] = {}
        self.windows: dict[str, int] = {}
        """Prompt → most tokens of a text after it."""
        self.captions: list[dict[str, object]] = []
        self.occurrences: list[pa.Table] = []
        self.failures: list[Failure] = []
        self.skipped: Counter[str] = Counter()
        self.named: defaultdict[str, bool] = defaultdict(bool)
        """Long text → whether any of its windows has a noun."""
        self.notes: set[str] = set()
        """How the shard was analysed, where it took more time than usual."""

    def run(self, samples: Iterable[Sample | Failure]) -> dict[str, pa.Table]:
        """Analyse samples, and return the tables collected so far."""
        self.collect(samples)
        return self.tables()

    @torch.inference_mode()
    def collect(self, samples: Iterable[Sample | Failure]) -> None:
        """Analyse samples. One that fails is a row in `errors`.

        A caption without a noun is not a failure; `skipped` counts it.
        """
        with heap_kept(self.model.device):
            self._collect_parts(samples)
        self.skipped[NO_NOUN] += list(self.named.values()).count(False)

    def _collect_parts(self, samples: Iterable[Sample | Failure]) -> None:
        for part in within_budget(self._readable(samples), lambda sample: len(sample.image or b""), IMAGE_BYTES):
            if self.settings.captions == "dataset":
                for items, batch in self.encoded(part):
                    self._analyse(items, batch)
                    del batch  # freed before the next but one is prepared, so that memory never holds three
                    if self.model.device.type == "cpu":
                        trim_heap(FREED)
            else:
                # A batch has one prompt length per language; sorting keeps padding short.
                part.sort(key=lambda sample: (sample.image is None, sample.language or ""))
                for chunk in _chunks(part, self.settings.batch_size, lambda sample: sample.image is None):
                    for pairs in self._with_images(chunk, lambda sample: sample):
                        self._generate(pairs)

    def _readable(self, samples: Iterable[Sample | Failure]) -> Iterator[Sample]:
        """Yield the samples that can be analysed; the others become failures."""
        for sample in samples:
            if isinstance(sample, Failure):
                self.failures.append(sample)
            elif sample.image is None and self.settings.score == "gradient":
                self._fail(sample, "read", "no image; --score gradient sums over the positions of an image")
            else:
                yield sample

    @phase("reduce")
    @torch.inference_mode()
    def tables(self) -> dict[str, pa.Table]:
        """Return all tables of `PARTS` except `decoded`; the model may run another shard meanwhile."""
        with side_stream(self.model.device):
            return self._tables()

    def _tables(self) -> dict[str, pa.Table]:
        concepts, totals = self.sums.tables()
        # Sorted because a thread decodes images ahead, so failures arrive in an order that depends on the machine.
        failures = sorted(self.failures, key=lambda failure: (failure.source, failure.sample_id, failure.stage))
        errors = [vars(failure) | {"shard_id": self.shard_id} for failure in failures]
        return {
            "captions": pa.Table.from_pylist(self.captions, schema=PARTS["captions"]),
            "occurrences": pa.concat_tables([PARTS["occurrences"].empty_table(), *self.occurrences]),
            "errors": pa.Table.from_pylist(errors, schema=PARTS["errors"]),
            "concepts": concepts,
            "totals": totals,
            "activity": pa.concat_tables([self.statistics.activity_table(), self.module.activity_table()]),
            "examples": self.statistics.examples_table(),
        }

    def _parts(self, sample: Sample) -> Iterator[Sample]:
        """Yield the sample, a long text in windows; nothing if its caption is empty."""
        if not sample.caption.strip():
            self._fail(sample, "read", "the caption is empty")
        elif sample.image is not None:
            yield sample
        else:
            prompt = self._prompt(sample, image=False)
            if prompt not in self.windows:
                self.windows[prompt] = window_of(self.model, prompt, self.settings.window)
            pieces = windows(self.model, prompt, sample.caption, self.windows[prompt])
            whole = len(pieces) == 1
            yield from [sample] if whole else (sample.window(number, text) for number, text in enumerate(pieces))

    def _captioned(self, samples: Sequence[Sample]) -> list[Captioned]:
        """Return the samples with their dataset captions, nouns and tokens, without those that can't be used."""
        prompts = [self._prompt(sample, image=sample.image is not None) for sample in samples]
        tokenized = tokenize_captions(self.model, prompts, [sample.caption for sample in samples])
        found = (
            self._caption(sample, prompt, *tokens)
            for sample, prompt, tokens in zip(samples, prompts, tokenized, strict=True)
        )
        return [captioned for captioned in found if captioned is not None]

    def _caption(
        self, sample: Sample, prompt: str, tokens: list[int], offsets: list[tuple[int, int]]
    ) -> Captioned | None:
        """Return the sample with its dataset caption's nouns and tokens; None if the caption can't be used."""
        if not tokens:
            self._fail(sample, "read", f"the tokenizer returns no token for the caption {sample.caption!r}")
            return None
        if len(tokens) > (self.model.context or len(tokens)):
            self._fail(
                sample, "read", f"{len(tokens):,} tokens; the model reads {self.model.context:,}: shorten the caption"
            )
            return None
        # The model would look for another image at this token.
        if (token := self.model.parts.image_token_id) in tokens:
            text = self.model.tokenizer.decode([token])
            self._fail(sample, "read", f"the caption contains {text}, which stands for an image: remove it")
            return None
        mentions = self._nouns(sample, sample.caption)
        self.sums.expected.update(mention.concept for mention in mentions)
        return Captioned(sample, prompt, sample.caption, mentions, tokens, offsets)

    def _prompt(self, sample: Sample, *, image: bool) -> str:
        prefix = prefix_given(self.settings, sample.caption)
        asked = sample.asked(self.settings.prompt)
        key = (asked, sample.language, image, prefix)
        # Chat templates are slow to render, and a shard has few different prompts.
        if key not in self.prompts:
            self.prompts[key] = prompt_text(self.model, asked, sample.language, image=image, prefix=prefix)
        return self.prompts[key]

    def _nouns(self, sample: Sample, caption: str) -> list[Mention]:
        generated = self.settings.captions == "generate"
        return self.nouns.find(caption, sample.language, sample.objects, generated=generated)

    def _fail(self, sample: Sample, stage: str, message: str) -> None:
        self.failures.append(Failure(sample.sample_id, sample.source, stage, " ".join(message.split())[:500]))

    def encoded(self, samples: Iterable[Sample]) -> Iterator[tuple[list[Captioned], Batch]]:
        """Yield batches of similar length; a thread prepares the next one while the model runs this one."""
        captioned = self._captioned([part for sample in samples for part in self._parts(sample)])
        with ThreadPoolExecutor(1) as pool:
            pending: deque[Future[list[Encoded]]] = deque()
            for chunk in self._batches(captioned):
                pending.append(pool.submit(self._encode, chunk))
                if len(pending) > 1:
                    yield from _await(pending.popleft())
            while pending:
                yield from _await(pending.popleft())

    def _batches(self, captioned: Sequence[Captioned]) -> Iterator[list[Captioned]]:
        """Yield what shares a batch: captions with or without an image, in rows of their own or in shared ones."""
        size, kinds = self.settings.batch_size, dict[tuple[bool, bool], list[list[Captioned]]]()
        for group in self._groups(captioned):
            kinds.setdefault((group[0].sample.image is None, len(group) > 1), []).append(group)
        for same in kinds.values():
            same.sort(key=self._batch_order)
            for some in within_budget(same, len, size):
                for part in within_budget(some, lambda group: sum(len(item.tokens) for item in group), POSITIONS):
                    yield [item for group in part for item in group]

    def _batch_order(self, row: Sequence[Captioned]) -> tuple[str, int, int]:
        """Return the key that rows are sorted by, so that similar ones share a batch."""
        # A backward pass serves one noun of every row, so rows with as many nouns share them all.
        nouns = sum(len(item.mentions) for item in row) if SCORES[self.settings.score].backward else 0
        # Rows of similar length need little padding.
        return row[0].prompt, nouns, sum(len(item.tokens) for item in row)

    def _groups(self, captioned: Sequence[Captioned]) -> Iterator[list[Captioned]]:
        """Yield what shares a row: captions of one image, at most `batch_size`, where the model allows it."""
        ordered = sorted(captioned, key=lambda item: (item.sample.image is None, item.prompt, len(item.tokens)))
        keys = Counter(item.sample.image_key for item in ordered if item.sample.image is not None)
        if self.sharing is None or len(keys) == keys.total() or self._may_not_share():
            yield from ([item] for item in ordered)
            return
        by_image: dict[str, list[Captioned]] = {}
        for item in ordered:
            if item.sample.image is None:
                yield [item]
            else:
                by_image.setdefault(item.sample.image_key, []).append(item)
        size = self.settings.batch_size
        for group in by_image.values():
            yield from (group[first : first + size] for first in range(0, len(group), size))

    def _encode(self, chunk: list[Captioned]) -> list[Encoded]:
        parts = self._with_images(chunk, lambda item: item.sample)
        return [encoded for pairs in parts for encoded in self._encode_pairs(pairs)]

    def _with_images(
        self, items: Sequence[Item], sample: Callable[[Item], Sample]
    ) -> Iterator[list[tuple[Item, Image | None]]]:
        """Yield items with their decoded images, in lists within the budget of pixels. Drops items of bad images.

        An image of consecutive items is decoded once.
        """
        groups = [list(group) for _, group in groupby(items, key=lambda item: sample(item).image_key)]
        for part in within_budget(groups, lambda group: pixels_of(self.model, sample(group[0]).image), BUDGET):
            yield [(item, image) for group in part for image in self._image(*map(sample, group)) for item in group]

    def _encode_pairs(self, pairs: Sequence[tuple[Captioned, Image | None]]) -> list[Encoded]:
        """Encode captions with their images; a sample that the processor rejects is left out."""

        def reject(pair: tuple[Captioned, Image | None], problem: str) -> None:
            self._fail(pair[0].sample, "encode", problem)

        # Processors have no common error class.
        return split_on_failure(pairs, self._batch, reject, errors=(Exception,))

    def _batch(self, pairs: Sequence[tuple[Captioned, Image | None]]) -> Encoded:
        items = [item for item, _ in pairs]
        tokens, offsets = [item.tokens for item in items], [item.offsets for item in items]
        prompts, images = [item.prompt for item in items], [image for _, image in pairs]
        batch = None
        # Siblings have one image object.
        if any(one is other for one, other in pairwise(images) if one is not None) and not self._may_not_share():
            shown = [image for image in images if image is not None]
            batch = encode_shared(self.model, prompts, shown, tokens, offsets)
        return items, batch or encode(self.model, prompts, images, tokens, offsets)

    def _may_not_share(self) -> bool:
        """Return whether captions of one image need rows of their own; if the model is the reason, note it."""
        if self.sharing is None:
            return True
        if self.sharing.problem:
            self.notes.add(f"captions of an image are in rows of their own: {self.sharing.problem}")
        return bool(self.sharing.problem)

    def _image(self, *samples: Sample) -> list[Image | None]:
        """Return the decoded image that samples share, None for text; a bad one is a failure of each, and nothing."""
        image = samples[0].image
        if image is None:
            return [None]
        try:
            return [decode_image(image, samples[0].background)]
        except ValueError as error:
            for sample in samples:
                self._fail(sample, "decode", f"image can't be read: {error}")
            return []

    def _generate(self, pairs: list[tuple[Sample, Image | None]]) -> None:
        """Caption samples with the model, in halves where memory runs out, and analyse these captions."""

        def write(part: Sequence[tuple[Sample, Image | None]]) -> list[tuple[Sample, str, Image | None, list[int]]]:
            samples, images = [sample for sample, _ in part], [image for _, image in part]
            prompts = [self._prompt(sample, image=images[0] is not None) for sample in samples]
            replies = generate(self.model, prompts, images, self.settings.longest)
            return list(zip(samples, prompts, images, replies, strict=True))

        for replies in split_on_failure(pairs, write, lambda pair, problem: self._fail(pair[0], "generate", problem)):
            kept = []
            for sample, prompt, image, tokens in replies:
                caption, offsets = caption_of(self.model, tokens)
                if not caption:
                    self._fail(sample, "generate", "the model wrote nothing")
                    continue
                kept.append((Captioned(sample, prompt, caption, self._nouns(sample, caption), tokens, offsets), image))
            for items, batch in self._encode_pairs(kept):
                self._analyse(items, batch)

    def _analyse(self, items: list[Captioned], batch: Batch) -> None:
        """Score a batch. If memory runs out or a sample fails, halve it until the failing sample is alone."""
        mentions = [(item.sample.sample_id, item.mentions) for item in items]
        positions = positions_of(batch, mentions, every=self.settings.pieces == "sum")
        labels = [labels_of(item.sample) for item in items]
        # Examples keep one sample per image, so statistics must know which samples share one.
        digests = [item.sample.digest for item in items]
        self.statistics.begin(labels, batch.spans, digests, batch.paths)
        try:
            score, folded = self.settings.score, self.settings.fold_norm
            # The tower runs in the same forward pass, so its activity costs no second one.
            with self.module.watching(batch):
                scored = score_batch(self.model, batch, positions, score, folded=folded, statistics=self.statistics)
        except FAILURES as error:
            # Only the message leaves this block: the error holds the frames, and so the memory, of the failed forward.
            problem = str(error)
        else:
            found = (
                self.statistics.non_finite(),
                self.module.count(labels, digests),
                non_finite_rows(positions, scored, len(items)),
            )
            unsound = [max(counts) for counts in zip(*found, strict=True)]
            if any(unsound):
                del scored
                self._leave_out(items, batch, unsound)
                return
            # Only now: statistics of a batch that is halved or loses a sample would be counted twice.
            self.statistics.commit()
            self.module.commit()
            self._collect(items, batch.spans, digests, *whole_nouns(positions, scored))
            return
        if len(items) == 1:
            self._fail(items[0].sample, "forward", problem)
            return
        free_memory()
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            self._analyse_again(half)

    def _analyse_again(self, items: list[Captioned]) -> None:
        for kept, smaller in self._encode(items):
            self._analyse(kept, smaller)

    def _leave_out(self, items: list[Captioned], batch: Batch, unsound: Sequence[int]) -> None:
        """Fail the samples with NaN or infinity in so many neurons, and analyse the others without them."""
        if batch.paths is not None:
            # Attention multiplies what a token may not see by 0, and 0 · NaN is NaN: others of the row may be sound.
            rows = {path.row for path, count in zip(batch.paths, unsound, strict=True) if count}
            suspect = [path.row in rows for path in batch.paths]
            self._analyse_again([item for item, alone in zip(items, suspect, strict=True) if not alone])
            for item in compress(items, suspect):
                self._analyse_again([item])
            return
        for item, count in zip(items, unsound, strict=True):
            if count:
                # A single NaN would spread through the neuron's sums to every concept of the run.
                neurons = f"{count:,} neuron{'s' * (count > 1)}"
                self._fail(item.sample, "score", f"NaN or infinity in the scores or activations of {neurons}")
        self._analyse_again([item for item, count in zip(items, unsound, strict=True) if not count])

    @phase("reduce")
    def _collect(
        self,
        items: list[Captioned],
        spans: Sequence[TokenSpan],
        digests: list[str | None],
        positions: list[TokenPosition],
        scored: Scored,
    ) -> None:
        """Add a scored batch to the tables."""
        for row, (item, digest) in enumerate(zip(items, digests, strict=True)):
            # Counted here, where each sample arrives once, however often its batch was halved.
            if item.sample.text_digest is None:
                self.skipped[NO_NOUN] += not item.mentions
            else:
                self.named[item.sample.text_digest] |= bool(item.mentions)
            self.captions.append(
                {
                    "sample_id": item.sample.sample_id,
                    "caption": item.caption,
                    "source": "dataset" if self.settings.captions == "dataset" else "generated",
                    "language": item.sample.language,
                    "domain": item.sample.domain,
                    "shard_id": self.shard_id,
                    "labels": [{"key": name, "value": label} for name, label in item.sample.labels.items()],
                    "image": digest,
                    "token_spans": [{"start": start, "stop": stop} for start, stop in item.offsets],
                    "text_start": next(span.start for span in spans if (span.row, span.modality) == (row, "text")),
                    "image_spans": [
                        {"start": span.start, "stop": span.stop}
                        for span in spans
                        if (span.row, span.modality) == (row, "image")
                    ],
                }
            )
        if not positions:
            return
        self.sums.add([position.concept for position in positions], scored.scores, scored.activation)
        self.occurrences.append(occurrence_table(self.model, positions, scored, self.settings.top_k))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run a block's work after what a GPU was given before, but not after what other threads give it meanwhile."""
    if device.type != "cuda":
        yield
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@phase("decode")
def _await(encoded: Future[list[Encoded]]) -> list[Encoded]:
    # Time spent here is time that the model waits for images.
    return encoded.result()


def prefix_given(settings: CensusSettings, caption: str) -> str | None:
    """Return what a census puts before a caption: its prefix, unless a caption of the data begins with it already."""
    return settings.prefix if settings.captions == "generate" else prefix_before(caption, settings.prefix)


def labels_of(sample: Sample) -> dict[str, str]:
    """Return the labels that a sample counts under, by kind, in addition to that of all samples."""
    found = {"language": sample.language, "domain": sample.domain, **sample.labels}
    return {kind: label for kind, label in found.items() if label is not None}


def _chunks(items: list[Item], size: int, kind: Callable[[Item], bool]) -> Iterator[list[Item]]:
    """Yield chunks of one kind: a sample with an image and one without can't share a batch."""
    for _, group in groupby(items, key=kind):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))
