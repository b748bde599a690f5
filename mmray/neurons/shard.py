"""A shard's samples → its tables: decode ahead, run in batches, score, reduce; a function of settings and samples."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import PIL.Image
import pyarrow as pa
import torch
from PIL.Image import Image

from mmray.datasets.samples import Failure, Sample
from mmray.models.generation import caption_of, generate, token_text
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import Mention, NounSource
from mmray.neurons.reduction import ConceptSums, candidates_kept
from mmray.neurons.scoring import Place, Scored, place_mentions, score_batch
from mmray.neurons.statistics import TokenStatistics
from mmray.settings import CensusSettings
from mmray.tables import NEURON_ENTRY, PART_SCHEMAS

LARGEST_IMAGE = 178_956_970
"""Pixels above which an image is refused unread: a small file can unfold to gigabytes."""


@dataclass(frozen=True)
class Captioned:
    """A sample with the caption to score, its nouns, and its tokens as they follow the prompt."""

    sample: Sample
    prompt: str
    caption: str
    mentions: list[Mention]
    tokens: list[int]
    offsets: list[tuple[int, int]]


class ShardAnalysis:
    """Collects the tables of one shard."""

    def __init__(self, model: LoadedModel, settings: CensusSettings, nouns: NounSource, shard_id: int) -> None:
        self.model = model
        self.settings = settings
        self.nouns = nouns
        self.shard_id = shard_id
        self.sums = ConceptSums(model.widths)
        self.statistics = TokenStatistics(model.widths, model.device)
        self.captions: list[dict[str, object]] = []
        self.occurrences: list[pa.Table] = []
        self.failures: list[Failure] = []

    @torch.inference_mode()
    def run(self, samples: Iterable[Sample | Failure]) -> dict[str, pa.Table]:
        """Return the tables of `PART_SCHEMAS` but `decoded`; what fails is a row in `errors`."""
        readable: list[Sample] = []
        for sample in samples:
            (self.failures if isinstance(sample, Failure) else readable).append(sample)  # type: ignore[arg-type]
        if self.settings.captions == "dataset":
            for items, batch in self.encoded(readable):
                self._analyse(items, batch)
        else:
            readable.sort(key=lambda sample: (sample.image is None, sample.language or ""))
            for chunk in _cut(readable, self.settings.batch_size):
                self._generate(chunk)
        return self.tables()

    def tables(self) -> dict[str, pa.Table]:
        """Return what was collected."""
        concepts, totals = self.sums.tables(candidates_kept(self.settings.candidates, sum(self.model.widths)))
        errors = [
            {
                "sample_id": failure.sample_id,
                "source": failure.source,
                "shard_id": self.shard_id,
                "stage": failure.stage,
                "message": failure.message,
            }
            for failure in self.failures
        ]
        return {
            "captions": pa.Table.from_pylist(self.captions, schema=PART_SCHEMAS["captions"]),
            "occurrences": pa.concat_tables([PART_SCHEMAS["occurrences"].empty_table(), *self.occurrences]),
            "errors": pa.Table.from_pylist(errors, schema=PART_SCHEMAS["errors"]),
            "concepts": concepts,
            "totals": totals,
            "activity": self.statistics.activity_table(),
            "examples": self.statistics.examples_table(),
        }

    def _caption(self, sample: Sample) -> Captioned | None:
        """Return the sample with its dataset caption, nouns and tokens."""
        if not sample.caption.strip():
            self._fail(sample, "read", "the caption is empty")
            return None
        prompt = prompt_text(self.model, self.settings.prompt, sample.language, image=sample.image is not None)
        tokens, offsets = tokenize_caption(self.model, prompt, sample.caption)
        return Captioned(sample, prompt, sample.caption, self._nouns(sample, sample.caption), tokens, offsets)

    def _nouns(self, sample: Sample, caption: str) -> list[Mention]:
        generated = self.settings.captions == "generate"
        mentions = self.nouns.find(caption, sample.language, sample.objects, generated=generated)
        if not mentions:
            self._fail(sample, "nouns", f"no noun found in {caption!r}; see --nouns")
        return mentions

    def _fail(self, sample: Sample, stage: str, message: str) -> None:
        self.failures.append(Failure(sample.sample_id, sample.source, stage, message))

    def encoded(self, samples: Iterable[Sample]) -> Iterator[tuple[list[Captioned], Batch]]:
        """Yield batches of like length, the next one decoded and encoded in a thread while the model has this one."""
        captioned = [found for sample in samples if (found := self._caption(sample)) is not None]
        captioned.sort(key=lambda item: (item.sample.image is None, item.prompt, len(item.tokens)))
        chunks = _cut(captioned, self.settings.batch_size)
        with ThreadPoolExecutor(1) as ahead:
            waiting: deque[Future[tuple[list[Captioned], Batch | None]]] = deque()
            for chunk in chunks:
                waiting.append(ahead.submit(self._encode, chunk))
                if len(waiting) > 1:
                    yield from _ready(waiting.popleft())
            while waiting:
                yield from _ready(waiting.popleft())

    def _encode(self, chunk: list[Captioned]) -> tuple[list[Captioned], Batch | None]:
        kept, images = [], []
        for item in chunk:
            image = self._image(item.sample)
            if image is not None or item.sample.image is None:
                kept.append(item)
                images.append(image)
        if not kept:
            return [], None
        return self._halved(kept, images)

    def _halved(self, items: list[Captioned], images: list[Image | None]) -> tuple[list[Captioned], Batch | None]:
        """Encode; where the processor refuses, find the sample that it refuses and go on without it."""
        try:
            return items, self._batch(items, images)
        except Exception as error:
            if len(items) > 1:
                fine = [self._halved([item], [image])[0] for item, image in zip(items, images, strict=True)]
                pairs = [(item, image) for item, image, ok in zip(items, images, fine, strict=True) if ok]
                if not pairs or len(pairs) == len(items):
                    raise
                return self._halved([item for item, _ in pairs], [image for _, image in pairs])
            self._fail(items[0].sample, "encode", str(error))
            return [], None

    def _batch(self, items: list[Captioned], images: list[Image | None]) -> Batch:
        tokens, offsets = [item.tokens for item in items], [item.offsets for item in items]
        return encode(self.model, [item.prompt for item in items], images, tokens, offsets)

    def _image(self, sample: Sample) -> Image | None:
        """Return the decoded image; a bad one is a failure and None."""
        if sample.image is None:
            return None
        try:
            image = PIL.Image.open(io.BytesIO(sample.image))
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"{image.width} × {image.height} pixels, more than {LARGEST_IMAGE:,}")
            return image.convert("RGB")
        except Exception as error:  # noqa: BLE001  decoders raise all kinds of errors on damaged files
            self._fail(sample, "decode", f"image can't be read: {error}")
            return None

    def _generate(self, chunk: list[Sample]) -> None:
        """Caption a batch of samples with the model, and analyse these captions."""
        pairs = [(sample, image) for sample in chunk if (image := self._image(sample)) is not None]
        if not pairs:
            return
        samples, images = [sample for sample, _ in pairs], [image for _, image in pairs]
        prompts = [prompt_text(self.model, self.settings.prompt, sample.language) for sample in samples]
        items, kept = [], []
        for sample, prompt, image, tokens in zip(
            samples, prompts, images, generate(self.model, prompts, images), strict=True
        ):
            caption, offsets = caption_of(self.model, tokens)
            if not caption:
                self._fail(sample, "generate", "the model wrote nothing")
                continue
            items.append(Captioned(sample, prompt, caption, self._nouns(sample, caption), tokens, offsets))
            kept.append(image)
        if items:
            self._analyse(items, self._batch(items, list(kept)))

    def _analyse(self, items: list[Captioned], batch: Batch) -> None:
        """Score a batch; where memory runs out or a sample can't be run, halve it until the culprit is alone."""
        places = [
            place
            for row, item in enumerate(items)
            for place in place_mentions(batch, row, item.sample.sample_id, item.mentions)
        ]
        self.statistics.begin([_labels(item.sample) for item in items], batch.runs)
        try:
            scored = score_batch(
                self.model,
                batch,
                places,
                self.settings.score,
                folded=self.settings.fold_norm,
                statistics=self.statistics,
            )
        except (RuntimeError, ValueError, IndexError) as error:
            self._split(items, error)
            return
        self.statistics.commit()
        self._collect(items, places, scored)

    def _split(self, items: list[Captioned], error: Exception) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(items) == 1:
            self._fail(items[0].sample, "forward", " ".join(str(error).split())[:500])
            return
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            kept, batch = self._encode(half)
            if batch is not None:
                self._analyse(kept, batch)

    def _collect(self, items: list[Captioned], places: list[Place], scored: Scored) -> None:
        for item in items:
            self.captions.append(
                {
                    "sample_id": item.sample.sample_id,
                    "caption": item.caption,
                    "source": "dataset" if self.settings.captions == "dataset" else "generated",
                    "language": item.sample.language,
                    "domain": item.sample.domain,
                    "shard_id": self.shard_id,
                }
            )
        if not places:
            return
        self.sums.begin([place.concept for place in places])
        for layer, (scores, activation) in enumerate(zip(scored.scores, scored.activation, strict=True)):
            self.sums.add(layer, scores, activation)
        self.occurrences.append(self._occurrences(places, scored))

    def _occurrences(self, places: list[Place], scored: Scored) -> pa.Table:
        device = scored.scores[0].device
        scores = torch.cat([part.to(device) for part in scored.scores], dim=1)
        activation = torch.cat([part.to(device) for part in scored.activation], dim=1)
        best = scores.topk(min(self.settings.top_k, scores.shape[1]), dim=1)
        index = best.indices.cpu()
        starts = torch.tensor([0, *self.model.widths]).cumsum(0)
        layer = torch.searchsorted(starts, index, right=True) - 1
        entries = pa.StructArray.from_arrays(
            [
                pa.array(layer.flatten().numpy()).cast(pa.int16()),
                pa.array((index - starts[layer]).flatten().numpy()).cast(pa.int32()),
                pa.array(best.values.cpu().flatten().numpy()),
                pa.array(activation.gather(1, best.indices).cpu().flatten().numpy()),
            ],
            fields=list(NEURON_ENTRY),
        )
        offsets = pa.array(range(0, len(entries) + 1, index.shape[1]), pa.int32())
        return pa.Table.from_arrays(
            [
                pa.array([place.sample_id for place in places], pa.string()),
                pa.array([place.concept for place in places], pa.string()),
                pa.array([token_text(self.model, place.token) for place in places], pa.string()),
                pa.array([place.token for place in places], pa.int32()),
                pa.array([place.position for place in places], pa.int32()),
                pa.array(scored.log_prob.float().cpu().numpy()),
                pa.ListArray.from_arrays(offsets, entries),
            ],
            schema=PART_SCHEMAS["occurrences"],
        )


def _labels(sample: Sample) -> dict[str, str]:
    found = {"language": sample.language, "domain": sample.domain, **sample.labels}
    return {kind: label for kind, label in found.items() if label is not None}


def _cut(items: list, size: int) -> list[list]:  # type: ignore[type-arg]
    return [items[start : start + size] for start in range(0, len(items), size)]


def _ready(future: Future[tuple[list[Captioned], Batch | None]]) -> Iterator[tuple[list[Captioned], Batch]]:
    items, batch = future.result()
    if batch is not None:
        yield items, batch
