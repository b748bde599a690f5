"""The training data of an edit: the run's samples, the model's own captions of them, and what it should say instead."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import pyarrow.compute as pc
import torch

from mmray.data.columns import Columns
from mmray.data.image_keys import image_keys, one_per_image
from mmray.data.samples import BACKGROUND, Sample, text_id
from mmray.data.shards import Manifest, read_shard
from mmray.data.sources import Source, open_source
from mmray.errors import InputError
from mmray.features.editing.augmentation import views
from mmray.features.editing.caption_rewriting import replaced as with_nouns
from mmray.features.editing.generation_cache import GenerationCache, record_generation
from mmray.features.editing.settings import EditSettings
from mmray.models.generation import caption_of, generate_to_end
from mmray.models.loading import LoadedModel, require_images
from mmray.models.options import LONGEST
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.cloze import cloze
from mmray.neurons.concepts import Mention, NounSource, find_forms, noun_source, object_forms
from mmray.neurons.model import NeuronModel, load_model, open_image
from mmray.neurons.split_on_oom import heap_kept
from mmray.runs.run import Run

BATCH_ROWS, WRITTEN = 32, 64
"""Most answers of a batch that is run once, and of one that the model writes token by token."""


@dataclass(frozen=True)
class Example:
    """An answer that the model should give, or keep giving, to a prompt about an image."""

    prompt: str
    image: bytes | None
    """Encoded until it is needed: hundreds of decoded photographs don't fit in memory."""
    tokens: tuple[int, ...]
    """Of the answer, with its end."""
    rejected: tuple[int, int] | None = None
    """Where the answer departs from the model's own: the position in the answer, and the token that the model says
    there."""
    no_repeat_from: int | None = None
    """Position after the new words, from which their first token must not come again; None if nothing new is said."""
    loss_from: int = 0
    """Tokens before this position are context: they are not learned."""
    sample_id: str = ""
    background: str = BACKGROUND
    # Not compared: == of two tensors is a tensor, which has no single truth value.
    cache: GenerationCache | None = field(default=None, compare=False, repr=False)
    """Recorded while the model wrote the answer, if the answer is its own."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, in the family's template, about an encoded image or none."""

    prompt: str
    image: bytes | None = None
    background: str = BACKGROUND


@dataclass
class EditDataset:
    """Samples of a run by id, and the model's own captions of them, each written once."""

    model: NeuronModel
    run: Run
    language: str = "en"
    prompt: str | None = None
    samples: dict[str, Sample] = field(default_factory=dict)
    caption_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the model's own captions, by sample id."""
    caches: dict[str, GenerationCache | None] = field(default_factory=dict)
    """Recorded while the model wrote some of these captions."""
    text_answers: dict[str | None, dict[str, list[Example]]] = field(default_factory=dict)
    """What is kept without an image, by kind, from a file or (None) the general set: the same for every edit."""
    ends: Counter[int] = field(default_factory=Counter)
    """How many answers the model ended with each token."""

    @property
    def end(self) -> tuple[int, ...]:
        """The token that the model ends its answers with; none before it has ended one.

        Some models have several, and write another one than the first: an edit that taught that would change every end.
        """
        return tuple(token for token, _ in self.ends.most_common(1))

    @cached_property
    def source(self) -> Source:
        """The data of the run."""
        settings, columns = self.run.info["settings"], Columns(**self.run.info["data"]["columns"])
        return open_source(settings["data"], columns, captions=settings["captions"] == "dataset")

    @cached_property
    def images(self) -> dict[str, str]:
        """The key of each sample's image or text."""
        return {self.name(sample): key for sample, key in image_keys(self.run.table("captions")).items()}

    def name(self, sample_id: str) -> str:
        """Return the id by which a row of the run is known here: that of the whole text for a text-only model."""
        return sample_id if self.model.parts.reads_images else text_id(sample_id)

    @cached_property
    def nouns(self) -> NounSource:
        """Where the run's concepts come from."""
        nouns = self.run.info["settings"]["nouns"]
        vocabulary = self.source.objects_vocabulary() if nouns in ("auto", "objects") else ()
        return noun_source(nouns, vocabulary, self.source.translations())

    def _forms(self, concept: str) -> set[str]:
        """Return a concept and its names in other languages, if the data translates its objects."""
        same = [
            names
            for name, names in self.nouns.translations.items()
            if names.get(self.language, name).casefold() == concept
        ]
        return {concept, *(form.casefold() for names in same for form in names.values())}

    def mentions(self, caption: str) -> list[Mention]:
        """Return the mentions of concepts in one of the model's own captions."""
        return self.nouns.find(caption, self.language, None, generated=True)

    def present(self, sample: Sample) -> frozenset[str]:
        """Return the concepts in a sample, named in the edit's language: its objects, else the nouns of its caption."""
        if self.nouns.kind == "objects":
            return object_forms(sample.objects or (), self.language, self.nouns.translations)
        # Nouns of another language can't be compared with those of the model's captions.
        if (sample.language or self.language) != self.language:
            return frozenset()
        return frozenset(mention.concept for mention in self.mentions(sample.caption))

    def prompt_for(self, sample: Sample) -> str:
        """Return the prompt for a caption of the sample; for a text-only model, the beginning of its text."""
        prefix = None if self.model.parts.reads_images else sample.cue or cloze(sample).cue
        asked = sample.asked(self.prompt)
        return prompt_text(self.model, asked, self.language, image=sample.image is not None, prefix=prefix)

    def seen(self, sample: Sample, source: str, seed: int) -> list[Sample]:
        """Return the forms in which an edit of a word sees a sample, each with an id of its own.

        An image as it is, mirrored and cropped; a text up to where it names the word.
        """
        if self.model.parts.reads_images:
            return [sample, *views(sample, seed)]
        return [replace(cloze(sample, [source]), sample_id=f"{sample.sample_id}, before {source}")]

    def end_of(self, own: Sequence[int], longest: int = LONGEST) -> tuple[int, ...]:
        """Return the end token of one of the model's own replies; nothing for one that was cut off at `longest`."""
        return self.end if len(own) < longest else ()

    def example(self, sample: Sample, answer: str | Sequence[int], own: Sequence[int]) -> Example:
        """Return a caption of a sample as an example: the model's own caption `own`, or a text that replaces it.

        A text is tokenised as the continuation of the prompt.
        """
        prompt = self.prompt_for(sample)
        tokens = tokenize_caption(self.model, prompt, answer)[0] if isinstance(answer, str) else answer
        return Example(
            prompt,
            sample.image,
            (*tokens, *self.end_of(own)),
            sample_id=sample.sample_id,
            background=sample.background,
            # The recorded states belong to the model's own tokens, and not to a text that replaces them.
            cache=self.caches.get(sample.sample_id) if self.caption_tokens.get(sample.sample_id) == tokens else None,
        )

    def read(self, sample_ids: Iterable[str]) -> list[Sample]:
        """Return the samples with these ids, in their order, without those that can no longer be read."""
        missing = set(sample_ids := list(sample_ids)) - set(self.samples)
        if missing:
            captions = self.run.table("captions").select(["sample_id", "shard_id"]).to_pylist()
            # Shards are read as a whole, each once, whichever of their samples are missing.
            manifest = Manifest.from_json(self.run.folder.manifest())
            for shard in sorted({row["shard_id"] for row in captions if self.name(row["sample_id"]) in missing}):
                for row in read_shard(self.source, manifest.shards[shard]):
                    if isinstance(row, Sample) and row.sample_id in missing:
                        self.samples[row.sample_id] = row
        return [self.samples[name] for name in sample_ids if name in self.samples]

    def own_captions(self, samples: Sequence[Sample], *, cache: bool = False) -> list[tuple[int, ...]]:
        """Return the token ids of the model's own greedy captions of these samples, without the end token.

        `cache` also keeps a `GenerationCache` of each, tens of thousands of numbers per token.
        """
        new = [sample for sample in samples if sample.sample_id not in self.caption_tokens]
        queries = [Prompt(self.prompt_for(sample), sample.image, sample.background) for sample in new]
        for sample, (tokens, recorded) in zip(new, self._write(queries, cache=cache), strict=True):
            self.caption_tokens[sample.sample_id] = tokens
            if cache:
                self.caches[sample.sample_id] = recorded
        return [self.caption_tokens[sample.sample_id] for sample in samples]

    def replies(self, queries: Sequence[Prompt], longest: int) -> list[Example]:
        """Return the model's own greedy replies as examples, recorded while it wrote them."""
        return [
            Example(
                query.prompt,
                query.image,
                (*tokens, *self.end_of(tokens, longest)),
                background=query.background,
                cache=recorded,
            )
            for query, (tokens, recorded) in zip(queries, self._write(queries, longest, cache=True), strict=True)
        ]

    def _write(
        self, queries: Sequence[Prompt], longest: int = LONGEST, *, cache: bool
    ) -> list[tuple[tuple[int, ...], GenerationCache | None]]:
        """Generate replies in batches; queries with and without an image never share one."""
        # Prompts of about the same length together: shorter ones are padded.
        lengths = map(len, self.model.tokenizer([query.prompt for query in queries])["input_ids"] if queries else [])
        keys = [(query.image is None, length) for query, length in zip(queries, lengths, strict=True)]
        order = sorted(range(len(queries)), key=lambda place: keys[place])
        written = []
        for _, group in groupby([queries[place] for place in order], key=lambda query: query.image is None):
            alike = list(group)
            # Batches of one size: a small rest takes nearly as long as a whole one.
            most = math.ceil(len(alike) / math.ceil(len(alike) / WRITTEN))
            for batch in within_budget(alike, lambda query: pixels_of(self.model, query.image), BUDGET, most):
                with heap_kept(self.model.device):
                    written += self._write_batch(batch, longest, cache=cache)
        return [found for _, found in sorted(zip(order, written, strict=True), key=lambda pair: pair[0])]

    def _write_batch(
        self, queries: Sequence[Prompt], longest: int, *, cache: bool
    ) -> list[tuple[tuple[int, ...], GenerationCache | None]]:
        """Generate the replies of one batch; if memory runs out, of each half."""
        images = [open_image(query.image, query.background) for query in queries]
        try:
            with record_generation(self.model) if cache else nullcontext() as recorder:
                replies = generate_to_end(self.model, [query.prompt for query in queries], images, longest)
        except torch.OutOfMemoryError:
            if len(queries) == 1:
                raise
            replies = None
        if replies is None:
            # Outside the handler: its traceback would keep alive the tensors that filled the memory.
            torch.cuda.empty_cache()
            half = len(queries) // 2
            return [
                *self._write_batch(queries[:half], longest, cache=cache),
                *self._write_batch(queries[half:], longest, cache=cache),
            ]
        self.ends.update(end for _, end in replies if end is not None)
        # Plus the end, which is predicted by a recorded step too.
        return [
            (tuple(tokens), recorder.of(row, len(tokens) + len(self.end_of(tokens, longest))) if recorder else None)
            for row, (tokens, _) in enumerate(replies)
        ]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""
        return caption_of(self.model, list(tokens))[0].strip()

    def ids(self, concepts: Iterable[str] | None = None) -> list[str]:
        """Return the ids of all samples in order, or of those whose caption names a concept, in any language."""
        rows = self.run.table("captions" if concepts is None else "occurrences")
        if concepts is not None:
            forms = {form for concept in concepts for form in self._forms(concept)}
            rows = rows.filter(pc.is_in(rows["concept"], pc.cast(sorted(forms), "string")))
        return list(dict.fromkeys(map(self.name, rows["sample_id"].to_pylist())))


def check_images(run: Run, settings: EditSettings) -> None:
    """Raise InputError for an edit that needs images of a text-only model."""
    known = run.info["settings"]
    if settings.reduce_hallucination:
        require_images(known["model"], "--reduce-hallucination", trust_remote_code=known["trust_remote_code"])


def open_edit_dataset(run: Run, settings: EditSettings, model: NeuronModel | None = None) -> EditDataset:
    """Return the dataset for an edit of the run, whose model is loaded unless it is given.

    Raises InputError for an edit that needs images of a text-only model.
    """
    check_images(run, settings)
    known = run.info["settings"]
    if model is None:
        model = load_model(known["model"], known["dtype"], trust_remote_code=known["trust_remote_code"])
    return EditDataset(model, run, settings.language, settings.prompt or known["prompt"])


def replaced(dataset: EditDataset, source: str, target: str, most: int, seed: int) -> list[Example]:
    """Return the model's own captions of images of the source, with `target` in place of `source`.

    At most `most` images are used, each also mirrored and cropped, each view with the model's own caption of it. If the
    article changes with the noun, a second example has the target after the source's article. Raises InputError if the
    model names the source in none of its captions.
    """
    # One sample per image, so that an image with several captions counts once.
    found = dataset.ids([source])
    random.Random(f"{source} {seed}").shuffle(found)
    samples = dataset.read(one_per_image(found, dataset.images)[:most])
    # Views get captions of their own: the model may describe a crop differently.
    seen = [(sample, view) for sample in samples for view in dataset.seen(sample, source, seed)]
    examples = []
    for (sample, view), tokens in zip(seen, dataset.own_captions([view for _, view in seen]), strict=True):
        rewritten = _rewritten(dataset, view, tokens, source, target)
        # The sample's id again, by which the edit remembers what it was made on.
        examples += [replace(example, sample_id=sample.sample_id) for example in rewritten]
    if not examples:
        raise InputError(
            f"{source!r}: the model names it in none of its own captions of {len(samples)} samples; "
            "give a concept that it says"
        )
    return examples


def _rewritten(dataset: EditDataset, sample: Sample, tokens: Sequence[int], source: str, target: str) -> list[Example]:
    """Return one own caption with the target in place of the source; nothing if it doesn't name the source."""
    caption = dataset.text(tokens)
    words = [(mention, target) for mention in find_forms(caption, frozenset({source}), dataset.language)]
    if not words:
        return []
    agreeing, literal = (with_nouns(caption, words, dataset.language, agreeing=each) for each in (True, False))
    example = departing(dataset, tokens, dataset.example(sample, agreeing, tokens))
    if literal == agreeing:
        return [example]
    # Decoding is greedy from left to right: if "a" is already said, "ant" must still follow where "an ant" was meant.
    after_article = departing(dataset, tokens, dataset.example(sample, literal, tokens))
    return [example, replace(after_article, loss_from=after_article.rejected[0] if after_article.rejected else 0)]


def departing(dataset: EditDataset, own: Sequence[int], new: Example) -> Example:
    """Return an example with the positions where it departs from the model's own caption `own`, and rejoins it."""
    before = (*own, *dataset.end_of(own))
    start = _first_difference(before, new.tokens)
    if start is None:
        return new
    # Compared from the end: the new words are over where the ending that both share begins.
    shared_end = _first_difference(before[::-1], new.tokens[::-1]) or 0
    return replace(new, rejected=(start, before[start]), no_repeat_from=len(new.tokens) - shared_end)


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (left, right) in pairs if left != right), None)


def batches(model: LoadedModel, examples: Sequence[Example]) -> list[Batch]:
    """Return the examples as batches, in order; examples with and without an image never share a batch."""
    found = []
    # groupby joins neighbours only, which keeps the order of the examples.
    for _, group in groupby(examples, key=lambda example: example.image is None):
        for chunk in within_budget(group, lambda example: pixels_of(model, example.image), BUDGET, BATCH_ROWS):
            found.append(_batch(model, chunk))
    return found


def _batch(model: LoadedModel, examples: Sequence[Example]) -> Batch:
    # A function of its own: its images are freed before the next batch is decoded.
    images = [open_image(example.image, example.background) for example in examples]
    tokens = [list(example.tokens) for example in examples]
    prompts = [example.prompt for example in examples]
    # Without character offsets: they serve to find nouns, which learning does not do.
    return encode(model, prompts, images, tokens, [[(0, 0)] * len(row) for row in tokens])
