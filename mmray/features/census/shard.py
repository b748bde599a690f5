"""A shard's samples → its tables: decode ahead, run in batches, score, reduce; a function of settings and samples."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
import torch
from PIL.Image import Image

from mmray.data.images import decode_image
from mmray.data.samples import Failure, Sample, image_digest
from mmray.engine.clock import phase
from mmray.features.census.occurrences import occurrence_table
from mmray.features.census.reduction import ConceptSums, candidates_kept
from mmray.features.census.settings import CensusSettings
from mmray.features.census.tables import PARTS
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import Batch, encode, prefix_before, prompt_text, tokenize_caption
from mmray.neurons.concepts import Mention, NounSource
from mmray.neurons.module_activity import ModuleActivity
from mmray.neurons.scoring import Scored, score_batch, unsound_rows, whole_nouns
from mmray.neurons.split_on_oom import FAILURES, free_memory, split_on_failure
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition, places_of


@dataclass(frozen=True)
class Captioned:
    """A sample with the caption to score, its nouns, and its tokens as they follow the prompt."""

    sample: Sample
    prompt: str
    caption: str
    mentions: list[Mention]
    tokens: list[int]
    offsets: list[tuple[int, int]]


HELD = 512 << 20
"""Encoded bytes of images that are held at once; a shard of more is analysed in parts."""

Item = TypeVar("Item")
Encoded: TypeAlias = tuple[list[Captioned], Batch]


NO_NOUN = "no noun"
"""Why a sample is skipped: its caption has no noun to rank neurons for. It is kept in all that needs none."""


class ShardAnalysis:
    """Collects the tables of one shard, and how many of its samples were skipped, by reason."""

    def __init__(self, model: LoadedModel, settings: CensusSettings, nouns: NounSource, shard_id: int) -> None:
        self.model = model
        self.settings = settings
        self.nouns = nouns
        self.shard_id = shard_id
        self.sums = ConceptSums(model.widths)
        self.statistics = TokenStatistics(model.widths)
        self.module = ModuleActivity(model, settings.module)
        self.prompts: dict[tuple[str | None, bool, str | None], str] = {}
        self.captions: list[dict[str, object]] = []
        self.occurrences: list[pa.Table] = []
        self.failures: list[Failure] = []
        self.skipped: Counter[str] = Counter()

    @torch.inference_mode()
    def run(self, samples: Iterable[Sample | Failure]) -> dict[str, pa.Table]:
        """Return the tables of `PARTS` but `decoded`; what fails is a row in `errors`.

        A caption without a noun is no failure: `skipped` counts it.
        """
        for part in within_budget(self._readable(samples), lambda sample: len(sample.image or b""), HELD):
            if self.settings.captions == "dataset":
                for items, batch in self.encoded(part):
                    self._analyse(items, batch)
                    del batch  # before the one after next is prepared: there are never three
            else:
                part.sort(key=lambda sample: (sample.image is None, sample.language or ""))
                for chunk in _cut(part, self.settings.batch_size, lambda sample: sample.image is None):
                    for pictured in self._pictured(chunk, lambda sample: sample):
                        self._generate(pictured)
        return self.tables()

    def _readable(self, samples: Iterable[Sample | Failure]) -> Iterator[Sample]:
        for sample in samples:
            if isinstance(sample, Failure):
                self.failures.append(sample)
            elif sample.image is None and self.settings.score == "gradient":
                self._fail(sample, "read", "no image, over whose positions --score gradient sums")
            else:
                yield sample

    @phase("reduce")
    def tables(self) -> dict[str, pa.Table]:
        """Return what was collected."""
        concepts, totals = self.sums.tables(candidates_kept(self.settings.candidates, sum(self.model.widths)))
        # Images are decoded ahead, so the order in which failures come depends on the machine.
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

    def _caption(self, sample: Sample) -> Captioned | None:
        """Return the sample with its dataset caption, nouns and tokens."""
        if not sample.caption.strip():
            self._fail(sample, "read", "the caption is empty")
            return None
        prompt = self._prompt(sample, image=sample.image is not None)
        tokens, offsets = tokenize_caption(self.model, prompt, sample.caption)
        if not tokens:
            self._fail(sample, "read", f"the tokenizer makes nothing of the caption {sample.caption!r}")
            return None
        if len(tokens) > (self.model.context or len(tokens)):
            self._fail(sample, "read", f"{len(tokens):,} tokens; the model reads {self.model.context:,}: cut the text")
            return None
        if (token := self.model.parts.image_token_id) in tokens:
            written = self.model.tokenizer.decode([token])
            self._fail(sample, "read", f"the caption has {written} in it, which stands for an image: take it out")
            return None
        return Captioned(sample, prompt, sample.caption, self._nouns(sample, sample.caption), tokens, offsets)

    def _prompt(self, sample: Sample, *, image: bool) -> str:
        prefix = prefix_given(self.settings, sample.caption)
        kind = (sample.language, image, prefix)
        if kind not in self.prompts:
            self.prompts[kind] = prompt_text(
                self.model, self.settings.prompt, sample.language, image=image, prefix=prefix
            )
        return self.prompts[kind]

    def _nouns(self, sample: Sample, caption: str) -> list[Mention]:
        generated = self.settings.captions == "generate"
        return self.nouns.find(caption, sample.language, sample.objects, generated=generated)

    def _fail(self, sample: Sample, stage: str, message: str) -> None:
        self.failures.append(Failure(sample.sample_id, sample.source, stage, " ".join(message.split())[:500]))

    def encoded(self, samples: Iterable[Sample]) -> Iterator[tuple[list[Captioned], Batch]]:
        """Yield batches of like length, the next one decoded and encoded in a thread while the model has this one."""
        captioned = [found for sample in samples if (found := self._caption(sample)) is not None]
        captioned.sort(key=lambda item: (item.sample.image is None, item.prompt, len(item.tokens)))
        with ThreadPoolExecutor(1) as ahead:
            waiting: deque[Future[list[Encoded]]] = deque()
            for chunk in _cut(captioned, self.settings.batch_size, lambda item: item.sample.image is None):
                waiting.append(ahead.submit(self._encode, chunk))
                if len(waiting) > 1:
                    yield from _awaited(waiting.popleft())
            while waiting:
                yield from _awaited(waiting.popleft())

    def _encode(self, chunk: list[Captioned]) -> list[Encoded]:
        parts = self._pictured(chunk, lambda item: item.sample)
        return [done for pairs in parts for done in self._halved(pairs)]

    def _pictured(
        self, items: Sequence[Item], sample: Callable[[Item], Sample]
    ) -> Iterator[list[tuple[Item, Image | None]]]:
        """Yield items with their decoded images, as many as the budget of pixels allows; without those of bad ones."""
        for part in within_budget(items, lambda item: pixels_of(self.model, sample(item).image), BUDGET):
            read = [(item, self._image(sample(item))) for item in part]
            yield [pair for pair in read if pair[1] is not None or sample(pair[0]).image is None]

    def _halved(self, pairs: Sequence[tuple[Captioned, Image | None]]) -> list[Encoded]:
        """Encode; a sample that the processor refuses is left out."""

        def refused(pair: tuple[Captioned, Image | None], problem: str) -> None:
            self._fail(pair[0].sample, "encode", problem)

        # Processors raise all kinds of errors.
        return split_on_failure(pairs, self._batch, refused, errors=(Exception,))

    def _batch(self, pairs: Sequence[tuple[Captioned, Image | None]]) -> Encoded:
        items = [item for item, _ in pairs]
        tokens, offsets = [item.tokens for item in items], [item.offsets for item in items]
        prompts, images = [item.prompt for item in items], [image for _, image in pairs]
        return items, encode(self.model, prompts, images, tokens, offsets)

    def _image(self, sample: Sample) -> Image | None:
        """Return the decoded image; a bad one is a failure and None."""
        if sample.image is None:
            return None
        try:
            return decode_image(sample.image, sample.background)
        except ValueError as error:
            self._fail(sample, "decode", f"image can't be read: {error}")
            return None

    def _generate(self, pairs: list[tuple[Sample, Image | None]]) -> None:
        """Caption samples with the model, in halves where it can't, and analyse these captions."""

        def write(some: Sequence[tuple[Sample, Image | None]]) -> list[tuple[Sample, str, Image | None, list[int]]]:
            samples, images = [sample for sample, _ in some], [image for _, image in some]
            prompts = [self._prompt(sample, image=images[0] is not None) for sample in samples]
            return list(
                zip(samples, prompts, images, generate(self.model, prompts, images, self.settings.longest), strict=True)
            )

        for written in split_on_failure(pairs, write, lambda pair, problem: self._fail(pair[0], "generate", problem)):
            kept = []
            for sample, prompt, image, tokens in written:
                caption, offsets = caption_of(self.model, tokens)
                if not caption:
                    self._fail(sample, "generate", "the model wrote nothing")
                    continue
                kept.append((Captioned(sample, prompt, caption, self._nouns(sample, caption), tokens, offsets), image))
            for items, batch in self._halved(kept):
                self._analyse(items, batch)

    def _analyse(self, items: list[Captioned], batch: Batch) -> None:
        """Score a batch; where memory runs out or a sample can't be run, halve it until the culprit is alone."""
        named = [(item.sample.sample_id, item.mentions) for item in items]
        places = places_of(batch, named, every=self.settings.pieces == "sum")
        labels = [_labels(item.sample) for item in items]
        digests = [image_digest(item.sample.image) for item in items]
        self.statistics.begin(labels, batch.runs, digests)
        try:
            score, folded = self.settings.score, self.settings.fold_norm
            with self.module.watching(batch):
                scored = score_batch(self.model, batch, places, score, folded=folded, statistics=self.statistics)
        except FAILURES as error:
            # Only the message leaves this block: the error holds the frames, and so the memory, of the failed forward.
            problem = str(error)
        else:
            found = (self.statistics.unsound(), self.module.count(labels), unsound_rows(places, scored, len(items)))
            unsound = [max(counts) for counts in zip(*found, strict=True)]
            if any(unsound):
                del scored
                self._leave_out(items, unsound)
                return
            self.statistics.commit()
            self.module.commit()
            self._collect(items, digests, *whole_nouns(places, scored))
            return
        if len(items) == 1:
            self._fail(items[0].sample, "forward", problem)
            return
        free_memory()
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            for kept, smaller in self._encode(half):
                self._analyse(kept, smaller)

    def _leave_out(self, items: list[Captioned], unsound: Sequence[int]) -> None:
        """Fail samples of a batch that have `unsound` neurons, and analyse the others without them.

        One NaN or infinity in a sum is that neuron's of every concept for the whole run.
        """
        for item, count in zip(items, unsound, strict=True):
            if count:
                neurons = f"{count:,} neuron{'s' * (count > 1)}"
                self._fail(item.sample, "score", f"NaN or infinity in the scores or activations of {neurons}")
        for kept, smaller in self._encode([item for item, count in zip(items, unsound, strict=True) if not count]):
            self._analyse(kept, smaller)

    @phase("reduce")
    def _collect(
        self, items: list[Captioned], digests: list[str | None], places: list[TokenPosition], scored: Scored
    ) -> None:
        for item, digest in zip(items, digests, strict=True):
            self.skipped[NO_NOUN] += not item.mentions
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
                }
            )
        if not places:
            return
        self.sums.begin([place.concept for place in places])
        for layer, (scores, activation) in enumerate(zip(scored.scores, scored.activation, strict=True)):
            self.sums.add(layer, scores, activation)
        self.occurrences.append(occurrence_table(self.model, places, scored, self.settings.top_k))


@phase("decode")
def _awaited(ahead: Future[list[Encoded]]) -> list[Encoded]:
    return ahead.result()


def prefix_given(settings: CensusSettings, caption: str) -> str | None:
    """Return what a census puts before a caption: its prefix, unless a caption of the data begins with it."""
    return settings.prefix if settings.captions == "generate" else prefix_before(caption, settings.prefix)


def _labels(sample: Sample) -> dict[str, str]:
    found = {"language": sample.language, "domain": sample.domain, **sample.labels}
    return {kind: label for kind, label in found.items() if label is not None}


def _cut(items: list[Any], size: int, kind: Callable[[Any], bool]) -> Iterator[list[Any]]:
    """Yield neighbours of one kind, for an image and none can't share a batch."""
    for _, group in groupby(items, key=kind):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
