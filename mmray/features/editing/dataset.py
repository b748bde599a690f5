"""What an edit is learnt on: the run's own samples, what the model says of them, and what it is to say instead."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import pyarrow.compute as pc
import torch

from mmray.data.columns import Columns
from mmray.data.image_keys import image_keys, one_per_image
from mmray.data.samples import BACKGROUND, Sample
from mmray.data.shards import Manifest, read_shard
from mmray.data.sources import Source, open_source
from mmray.errors import InputError
from mmray.features.editing.augmentation import views
from mmray.features.editing.caption_rewriting import replaced as with_nouns
from mmray.features.editing.generation_cache import GenerationCache, record_generation
from mmray.features.editing.settings import EditSettings
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import Mention, NounSource, find_forms, noun_source, object_forms
from mmray.neurons.model import NeuronModel, load_model, open_image
from mmray.runs.run import Run

ROWS_A_BATCH = 32


@dataclass(frozen=True)
class Example:
    """An answer that the model is to give, or to go on giving, to a prompt about an image; token ids, with its end.

    The image stays encoded until it is needed: of hundreds of photographs not all fit in memory decoded.
    `avoided` is what it would say otherwise: the token to predict no more, by its place in the answer. `said` is the
    place behind the new words from which on their first token is not to come again; None: nothing new is said. `heard`
    is what the model held while it wrote the answer, of an answer of its own. What stands before the place `learnt` is
    read, and not to be said.
    """

    prompt: str
    image: bytes | None
    tokens: tuple[int, ...]
    avoided: tuple[int, int] | None = None
    said: int | None = None
    learnt: int = 0
    sample_id: str = ""
    background: str = BACKGROUND
    heard: GenerationCache | None = field(default=None, compare=False, repr=False)


@dataclass
class EditDataset:
    """Samples of a run by id, and the captions that the model itself writes of them, each written once."""

    model: NeuronModel
    run: Run
    language: str = "en"
    prompt: str | None = None
    samples: dict[str, Sample] = field(default_factory=dict)
    written: dict[str, tuple[int, ...]] = field(default_factory=dict)
    heard: dict[str, GenerationCache | None] = field(default_factory=dict)
    """What the model held while it wrote some of them."""

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        ends = self.model.network.generation_config.eos_token_id
        ends = self.model.tokenizer.eos_token_id if ends is None else ends
        return int(ends[0] if isinstance(ends, list) else ends)

    @cached_property
    def source(self) -> Source:
        """The data of the run."""
        settings, columns = self.run.info["settings"], Columns(**self.run.info["data"]["columns"])
        return open_source(settings["data"], columns, captions=settings["captions"] == "dataset")

    @cached_property
    def images(self) -> dict[str, str]:
        """The key of each sample's image."""
        return image_keys(self.run.table("captions"))

    @cached_property
    def nouns(self) -> NounSource:
        """Where the run's concepts come from."""
        nouns = self.run.info["settings"]["nouns"]
        vocabulary = self.source.objects_vocabulary() if nouns in ("auto", "objects") else ()
        return noun_source(nouns, vocabulary, self.source.translations())

    def _forms(self, concept: str) -> set[str]:
        """Return a concept and its names in other languages, where the data translates its objects."""
        same = [
            names
            for name, names in self.nouns.translations.items()
            if names.get(self.language, name).casefold() == concept
        ]
        return {concept, *(form.casefold() for names in same for form in names.values())}

    def named(self, caption: str) -> list[Mention]:
        """Return the mentions of concepts in a caption of the model's own."""
        return self.nouns.find(caption, self.language, None, generated=True)

    def present(self, sample: Sample) -> frozenset[str]:
        """Return the concepts that are there: the sample's objects, else what its caption names; in the language."""
        if self.nouns.kind == "objects":
            return object_forms(sample.objects or (), self.language, self.nouns.translations)
        if (sample.language or self.language) != self.language:
            return frozenset()
        return frozenset(mention.concept for mention in self.named(sample.caption))

    def ask(self, sample: Sample) -> str:
        """Return the prompt of a caption of the sample."""
        return prompt_text(self.model, self.prompt, self.language, image=sample.image is not None)

    def ending(self, own: Sequence[int]) -> tuple[int, ...]:
        """Return the end behind a caption of the model's own; nothing behind one that was cut off for its length."""
        return (self.end,) if len(own) < LONGEST else ()

    def example(self, sample: Sample, answer: str | Sequence[int], own: Sequence[int]) -> Example:
        """Return a caption of a sample as an example: `own`, the model's, or another that takes its place.

        A text is tokenised as it follows the prompt.
        """
        prompt = self.ask(sample)
        tokens = tokenize_caption(self.model, prompt, answer)[0] if isinstance(answer, str) else answer
        return Example(
            prompt,
            sample.image,
            (*tokens, *self.ending(own)),
            sample_id=sample.sample_id,
            background=sample.background,
            heard=self.heard.get(sample.sample_id) if self.written.get(sample.sample_id) == tokens else None,
        )

    def read(self, wanted: Iterable[str]) -> list[Sample]:
        """Return the samples of these ids, in their order; what can't be read any more is left out."""
        missing = set(wanted := list(wanted)) - set(self.samples)
        if missing:
            captions = self.run.table("captions").select(["sample_id", "shard_id"])
            held = captions.filter(pc.is_in(captions["sample_id"], pc.cast(sorted(missing), "string")))
            manifest = Manifest.from_json(self.run.folder.manifest())
            for shard in sorted(set(held["shard_id"].to_pylist())):
                for row in read_shard(self.source, manifest.shards[shard]):
                    if isinstance(row, Sample) and row.sample_id in missing:
                        self.samples[row.sample_id] = row
        return [self.samples[name] for name in wanted if name in self.samples]

    def own(self, samples: Sequence[Sample], *, hear: bool = False) -> list[tuple[int, ...]]:
        """Return the token ids of the model's own greedy captions of these samples, without the end.

        `hear`: what the model holds while it writes them is kept, too; some tens of thousands of numbers a token.
        """
        new = [sample for sample in samples if sample.sample_id not in self.written]
        for some in within_budget(new, lambda sample: pixels_of(self.model, sample.image), BUDGET, 2 * ROWS_A_BATCH):
            self._write(some, hear=hear)
        return [self.written[sample.sample_id] for sample in samples]

    def _write(self, samples: Sequence[Sample], *, hear: bool) -> None:
        """Have captions of one batch written; where memory runs out, in halves."""
        images, prompts = (
            [open_image(sample.image, sample.background) for sample in samples],
            [self.ask(sample) for sample in samples],
        )
        try:
            with record_generation(self.model) if hear else nullcontext() as heard:
                written = generate(self.model, prompts, images)
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
            written = None
        if written is None:
            # Not within the handler, whose traceback holds on to what filled the memory.
            torch.cuda.empty_cache()
            self._write(samples[: len(samples) // 2], hear=hear)
            self._write(samples[len(samples) // 2 :], hear=hear)
            return
        for row, (sample, tokens) in enumerate(zip(samples, written, strict=True)):
            self.written[sample.sample_id] = tuple(tokens)
            if heard:
                self.heard[sample.sample_id] = heard.of(row, len(tokens) + len(self.ending(tokens)))

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens say."""
        return caption_of(self.model, list(tokens))[0].strip()

    def ids(self, concepts: Iterable[str] | None = None) -> list[str]:
        """Return the ids of all samples, or of those at which one of the concepts occurs in any language, in order."""
        rows = self.run.table("captions" if concepts is None else "occurrences")
        if concepts is not None:
            forms = {form for concept in concepts for form in self._forms(concept)}
            rows = rows.filter(pc.is_in(rows["concept"], pc.cast(sorted(forms), "string")))
        return list(dict.fromkeys(rows["sample_id"].to_pylist()))


def open_edit_dataset(run: Run, settings: EditSettings) -> EditDataset:
    """Return the material for an edit of a run, on the run's model, which is loaded."""
    known = run.info["settings"]
    model = load_model(known["model"], known["dtype"], trust_remote_code=known["trust_remote_code"])
    return EditDataset(model, run, settings.language, settings.prompt or known["prompt"])


def replaced(material: EditDataset, source: str, target: str, most: int, seed: int) -> list[Example]:
    """Return examples that say `target` where the model says `source` in its own captions of samples of the source.

    Where the article changes with the noun, another example says the target behind the source's: somebody may have said
    that already. Of each of at most `most` images there are further views, mirrored and cut, each with the model's
    caption of it. Raises InputError where the model names the source in none of them.
    """
    found = material.ids([source])
    random.Random(f"{source} {seed}").shuffle(found)
    samples = material.read(one_per_image(found, material.images)[:most])
    seen = [(sample, view) for sample in samples for view in (sample, *views(sample, seed))]
    examples = []
    for (sample, view), tokens in zip(seen, material.own([view for _, view in seen]), strict=True):
        said = material.text(tokens)
        if find_forms(said, frozenset({source}), material.language):
            rewritten = _rewritten(material, view, tokens, said, source, target)
            examples += [replace(example, sample_id=sample.sample_id) for example in rewritten]
    if not examples:
        raise InputError(
            f"{source!r}: the model names it in none of its own captions of {len(samples)} samples; "
            "give a concept that it says"
        )
    return examples


def _rewritten(
    material: EditDataset,
    sample: Sample,
    tokens: Sequence[int],
    said: str,
    source: str,
    target: str,
) -> list[Example]:
    words = [(mention, target) for mention in find_forms(said, frozenset({source}), material.language)]
    agreeing, literal = (with_nouns(said, words, material.language, agreeing=each) for each in (True, False))
    example = departing(material, tokens, material.example(sample, agreeing, tokens))
    if literal == agreeing:
        return [example]
    behind = departing(material, tokens, material.example(sample, literal, tokens))
    return [example, replace(behind, learnt=behind.avoided[0] if behind.avoided else 0)]


def departing(material: EditDataset, tokens: Sequence[int], new: Example) -> Example:
    """Return an example with the place where it leaves what the model says (`tokens`), and where it has joined it."""
    before = (*tokens, *material.ending(tokens))
    place = next((n for n, pair in enumerate(zip(before, new.tokens, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return new
    behind = len(new.tokens) - next(
        (n for n, pair in enumerate(zip(before[::-1], new.tokens[::-1], strict=False)) if pair[0] != pair[1]), 0
    )
    return replace(new, avoided=(place, before[place]), said=behind)


def kept(
    material: EditDataset, without: Iterable[str], most: int, seed: int, first: Iterable[str] = ()
) -> list[Example]:
    """Return examples that keep what the model says: its own captions of images that don't show, and captions that
    don't name, any of `without`; of the samples `first`, in their order, for up to half of them, then drawn at random.
    Each is of another image; one that any of its samples' captions says to show the concepts is left out.
    """
    without, images = list(without), material.images
    shown = {images[name] for name in material.ids(without)}
    others = [name for name in material.ids() if images[name] not in shown]
    random.Random(seed).shuffle(others)
    foremost = one_per_image((name for name in first if images[name] not in shown), images)[: most // 2]
    chosen = one_per_image([*foremost, *others], images)[:most]
    samples = [sample for sample in material.read(chosen) if not set(without) & set(sample.objects or ())]
    examples = []
    for sample, tokens in zip(samples, material.own(samples, hear=True), strict=True):
        said = material.text(tokens)
        if not find_forms(said, frozenset(without), material.language):
            examples.append(material.example(sample, tokens, tokens))
    return examples


def batches(model: LoadedModel, examples: Sequence[Example]) -> list[Batch]:
    """Return the examples as batches of the network, in order; neighbours without an image apart."""
    found = []
    for _, group in groupby(examples, key=lambda example: example.image is None):
        for chunk in within_budget(group, lambda example: pixels_of(model, example.image), BUDGET, ROWS_A_BATCH):
            found.append(_batch(model, chunk))
    return found


def _batch(model: LoadedModel, examples: Sequence[Example]) -> Batch:
    tokens = [list(example.tokens) for example in examples]
    prompts = [example.prompt for example in examples]
    images = [open_image(example.image, example.background) for example in examples]
    return encode(model, prompts, images, tokens, [[(0, 0)] * len(row) for row in tokens])
