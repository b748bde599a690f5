"""What to learn from to reduce hallucination: the hallucinations in the model's own captions, and corrected captions.

A hallucination is a noun that the model names and the sample lacks, by the data's objects, else by its caption. A pair
(context, word) is an object in the image and the word that the model claims with it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from mmray.data.samples import Sample
from mmray.errors import InputError
from mmray.features.editing.caption_rewriting import replaced, without
from mmray.features.editing.dataset import EditDataset, Example, departing
from mmray.features.editing.training import log_likelihoods
from mmray.neurons.concepts import Mention

MOST_IMAGES = 1024
"""Images of the run that the model captions: writing a caption takes about as long as a census does for one."""
FEWEST_CLAIMS = 3
"""Captions that must claim a word with a context for the two to be a pair."""
LOWEST_RATE = 0.1
"""Smallest share of samples with the context and without the word whose captions claim the word, for a pair."""


@dataclass(frozen=True)
class OwnCaption:
    """The model's own caption of a sample, and what of it is in the image."""

    sample: Sample
    tokens: tuple[int, ...]
    caption: str
    mentions: tuple[Mention, ...]
    present: frozenset[str]

    @property
    def wrong(self) -> list[Mention]:
        """The nouns that are named but absent."""
        return [mention for mention in self.mentions if mention.concept not in self.present]

    @property
    def missed(self) -> list[str]:
        """The objects that are present but not named."""
        return sorted(self.present - {mention.concept for mention in self.mentions})


@dataclass(frozen=True)
class Hallucinations:
    """What an edit against hallucination is learned from."""

    pairs: tuple[tuple[str, str], ...]
    new: list[Example]
    """Captions without the absent objects."""
    guards: list[Example]
    """Captions that rightly name a hallucinated word; the edit must keep them."""
    without_guarded_word: list[Example]
    """Captions of guards without that word: used to locate neurons, never learned."""
    keep: list[Example]
    """Captions with nothing wrong in them."""


def hallucinations(dataset: EditDataset, most: int, kept: int, seed: int) -> Hallucinations:
    """Find what the model hallucinates, in at most `most` captions per word, and what it should say.

    Raises InputError if the model names nothing absent often enough.
    """
    captions = list(own_captions(dataset, MOST_IMAGES, seed))
    # Shuffled before `most` cuts: the order of the data may follow its subjects.
    random.Random(seed).shuffle(captions)
    pairs = pairs_of(captions)
    words = {word for _, word in pairs}
    claims = [caption for caption in captions if words & _concepts(caption.wrong)]
    new = _corrected(dataset, _most_per_word(claims, words, most))
    if not new:
        raise InputError(
            f"{dataset.run.uri}: the model claims nothing {FEWEST_CLAIMS} times or more that is not there; "
            "analyse more samples, or use --suppress WORD"
        )
    right = [caption for caption in captions if not caption.wrong]
    guards = _most_per_word([caption for caption in right if words & _concepts(caption.mentions)], words, most)
    guarded = {id(caption) for caption in guards}
    contexts = {context for context, _ in pairs}
    # Images with a context first: there the model must decide whether the word is present.
    rest = sorted((c for c in right if id(c) not in guarded), key=lambda caption: not contexts & caption.present)
    shortened = [_without_guarded_word(dataset, caption, words) for caption in guards]
    return Hallucinations(
        pairs=pairs,
        new=new,
        guards=[dataset.example(caption.sample, caption.tokens, caption.tokens) for caption in guards],
        without_guarded_word=[example for examples in shortened for example in examples[:1]],
        keep=[dataset.example(caption.sample, caption.tokens, caption.tokens) for caption in rest[:kept]],
    )


def own_captions(dataset: EditDataset, most: int, seed: int) -> Iterator[OwnCaption]:
    """Yield the model's captions of at most `most` of the run's images that show something, in the dataset's language.

    What any caption of an image names is present. One sample stands for all samples of its image.
    """
    present: dict[str, frozenset[str]] = {}
    first: dict[str, Sample] = {}
    for sample in dataset.read(_ids_of_images(dataset, most, seed)):
        # Where nothing is known to be present, every noun would look hallucinated.
        if sample.image and (shown := dataset.present(sample)):
            image = dataset.images[sample.sample_id]
            present[image] = present.get(image, frozenset()) | shown
            first.setdefault(image, sample)
    for (image, sample), tokens in zip(first.items(), dataset.own_captions(list(first.values())), strict=True):
        caption = dataset.text(tokens)
        yield OwnCaption(sample, tokens, caption, tuple(dataset.mentions(caption)), present[image])


def _ids_of_images(dataset: EditDataset, most: int, seed: int) -> list[str]:
    """Return the ids of all samples of at most `most` images, in the order of the data.

    Shards are drawn at random and used up one by one, because a shard is read as a whole.
    """
    table = dataset.run.table("captions").select(["sample_id", "shard_id"])
    shards: dict[int, list[str]] = {}
    for name, shard in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
        shards.setdefault(shard, []).append(name)
    order = sorted(shards)
    random.Random(seed).shuffle(order)
    found = dict.fromkeys(dataset.images[name] for shard in order for name in shards[shard])
    chosen = set(islice(found, most))
    return [name for name in table["sample_id"].to_pylist() if dataset.images[name] in chosen]


def pairs_of(captions: Sequence[OwnCaption]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of a context and a hallucinated word, the most frequent first.

    The rate of a pair is the share of samples with the context and without the word whose captions claim the word. A
    word keeps the contexts with at least half its highest rate.
    """
    claimed = Counter((context, word) for one in captions for word in _concepts(one.wrong) for context in one.present)
    found: dict[str, list[tuple[float, int, str]]] = {}
    for (context, word), count in claimed.items():
        # Never 0: a caption that claims the word with this context is itself one of these.
        chances = sum(context in caption.present and word not in caption.present for caption in captions)
        if count >= FEWEST_CLAIMS and count >= LOWEST_RATE * chances:
            found.setdefault(word, []).append((count / chances, count, context))
    pairs = [
        (count, context, word)
        for word, rows in found.items()
        for rate, count, context in rows
        if rate >= max(rows)[0] / 2
    ]
    # Names break ties: claims were counted from sets, whose order changes between processes.
    return tuple((context, word) for _, context, word in sorted(pairs, key=lambda row: (-row[0], row[1:])))


def _corrected(dataset: EditDataset, captions: Sequence[OwnCaption]) -> list[Example]:
    """Return each caption without the absent objects, in the wording that the model finds likeliest."""
    # Sorted, because of wordings that are equally likely the first is taken.
    worded = [(caption, sorted(wordings(dataset, caption))) for caption in captions]
    examples = [dataset.example(one.sample, wording, one.tokens) for one, found in worded for wording in found]
    scored = iter(zip(log_likelihoods(dataset.model, examples), examples, strict=True))
    best = []
    for caption, found in worded:
        rows = [next(scored) for _ in found]
        if rows:
            example = max(rows, key=lambda row: row[0])[1]
            # Nothing new is named, so there is no word to ban afterwards.
            best.append(replace(departing(dataset, caption.tokens, example), no_repeat_from=None))
    return best


def wordings(dataset: EditDataset, own: OwnCaption) -> set[str]:
    """Return captions that name nothing absent and all that the model rightly named.

    Candidates: the caption with the absent nouns dropped from their lists; with the one absent noun replaced by the one
    missed object; and the data's own caption, if it is in this language.
    """
    language = dataset.language
    rightly_named = _concepts(own.mentions) & own.present
    # Data without captions has empty ones, which name nothing absent either.
    captioned = own.sample.caption.strip() and (own.sample.language or "en") == language
    found = {own.sample.caption} if captioned else set()
    captions = {own.caption}
    for _ in own.wrong:
        captions = {shorter for caption in captions for shorter in _without_first_wrong(dataset, own, caption)}
    found |= captions
    if len(own.wrong) == len(own.missed) == 1:
        found.add(replaced(own.caption, [(own.wrong[0], own.missed[0])], language))
    # The data's own caption is only filtered here: it may leave out what the model rightly named.
    return {caption for caption in found if rightly_named <= _concepts(dataset.mentions(caption)) <= own.present}


def _without_first_wrong(dataset: EditDataset, own: OwnCaption, caption: str) -> Iterator[str]:
    """Yield the caption without its first absent noun."""
    wrong = next((mention for mention in dataset.mentions(caption) if mention.concept not in own.present), None)
    if wrong is not None:
        yield from without(caption, wrong, dataset.language)


def _without_guarded_word(dataset: EditDataset, own: OwnCaption, words: set[str]) -> list[Example]:
    """Return the caption without a hallucinated word that it rightly names: what would be wrong to say."""
    mention = next(mention for mention in own.mentions if mention.concept in words)
    found = sorted(without(own.caption, mention, dataset.language))
    return [departing(dataset, own.tokens, dataset.example(own.sample, caption, own.tokens)) for caption in found]


def _most_per_word(captions: Sequence[OwnCaption], words: set[str], most: int) -> list[OwnCaption]:
    """Return the captions that name a word which fewer than `most` earlier ones name."""
    counts = Counter[str]()
    found = []
    for caption in captions:
        named = words & _concepts(caption.mentions)
        if any(counts[word] < most for word in named):
            found.append(caption)
            counts.update(named)
    return found


def _concepts(mentions: Iterable[Mention]) -> set[str]:
    return {mention.concept for mention in mentions}
