"""Hallucinations of a model in its own captions of a run's samples: which words, in which contexts, and what is right.

A hallucination is a noun that the model names and the sample lacks: by the data's objects, else by its caption. A pair
(context, word) is an object that is there and the word that the model claims with it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mmray.data.samples import Sample
from mmray.errors import InputError
from mmray.features.editing.caption_rewriting import replaced, without
from mmray.features.editing.dataset import EditDataset, Example, departing
from mmray.features.editing.training import log_likelihoods
from mmray.neurons.concepts import Mention

FEWEST = 3
"""Captions in which a word must be claimed with a context for the two to be a pair."""
RATE = 0.1
"""And of those with the context and without the word, the least part that claims it."""


@dataclass(frozen=True)
class Told:
    """What the model says of a sample, and what of it is there."""

    sample: Sample
    tokens: tuple[int, ...]
    caption: str
    mentions: tuple[Mention, ...]
    present: frozenset[str]

    @property
    def wrong(self) -> list[Mention]:
        """The nouns that are named and not there."""
        return [mention for mention in self.mentions if mention.concept not in self.present]

    @property
    def missed(self) -> list[str]:
        """What is there and not named."""
        return sorted(self.present - {mention.concept for mention in self.mentions})


@dataclass(frozen=True)
class Hallucinations:
    """What an edit against hallucination is learnt on.

    `new`: captions with what is not there taken out. `guards`: captions that rightly name a hallucinated word; for each
    `others` has a caption without that word, for the contrast alone. `keep`: captions with nothing wrong in them.
    """

    pairs: tuple[tuple[str, str], ...]
    new: list[Example]
    guards: list[Example]
    others: list[Example]
    keep: list[Example]


def hallucinations(material: EditDataset, most: int, kept: int, seed: int) -> Hallucinations:
    """Find what the model hallucinates, from `most` captions a word, and what it should say.

    Raises InputError where the model names nothing that is not there.
    """
    told = list(tell(material))
    random.Random(seed).shuffle(told)
    pairs = pairs_of(told)
    words = {word for _, word in pairs}
    claims = [one for one in told if words & _words(one.wrong)]
    new = _corrected(material, _few(claims, words, most))
    if not new:
        raise InputError(
            f"{material.run.uri}: the model claims nothing {FEWEST} times or more that is not there; "
            "analyse more samples, or use --suppress WORD"
        )
    right = [one for one in told if not one.wrong]
    named = _few([one for one in right if words & _words(one.mentions)], words, most)
    known = {id(one) for one in named}
    contexts = {context for context, _ in pairs}
    # First those with a context: that is where it must be told whether the word is there.
    rest = sorted((one for one in right if id(one) not in known), key=lambda one: not contexts & one.present)
    others = [_others(material, one, words) for one in named]
    return Hallucinations(
        pairs=pairs,
        new=new,
        guards=[material.example(one.sample, one.tokens, one.tokens) for one in named],
        others=[example for examples in others for example in examples[:1]],
        keep=[material.example(one.sample, one.tokens, one.tokens) for one in rest[:kept]],
    )


def tell(material: EditDataset) -> Iterator[Told]:
    """Yield what the model says of each of the run's images, in the material's language.

    What any caption of an image names is there; the first caption that names something stands for the others.
    """
    there: dict[str, frozenset[str]] = {}
    first: dict[str, Sample] = {}
    for sample in material.read(material.ids()):
        if sample.image and (present := material.present(sample)):
            image = material.images[sample.sample_id]
            there[image] = there.get(image, frozenset()) | present
            first.setdefault(image, sample)
    for (image, sample), tokens in zip(first.items(), material.own(list(first.values())), strict=True):
        caption = material.text(tokens)
        yield Told(sample, tokens, caption, tuple(material.named(caption)), there[image])


def pairs_of(told: Sequence[Told]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of a context and a hallucinated word, the most frequent first.

    Of several contexts of a word those count whose rate, claims of the word where the context is there and the word is
    not, is at least half of the highest.
    """
    claimed = Counter((context, wrong) for one in told for wrong in _words(one.wrong) for context in one.present)
    found: dict[str, list[tuple[float, int, str]]] = {}
    for (context, word), count in claimed.items():
        places = sum(context in one.present and word not in one.present for one in told)
        if count >= FEWEST and count >= RATE * places:
            found.setdefault(word, []).append((count / places, count, context))
    pairs = [
        (count, context, word)
        for word, rows in found.items()
        for rate, count, context in rows
        if rate >= max(rows)[0] / 2
    ]
    return tuple((context, word) for _, context, word in sorted(pairs, key=lambda row: (-row[0], row[1:])))


def _corrected(material: EditDataset, told: Sequence[Told]) -> list[Example]:
    """Return each caption with what is not there taken out, in the likeliest of several wordings.

    Wordings: without the noun in its list of things; with what is there and not named in its place; the data's own
    caption, where it is in this language.
    """
    wordings = [(one, sorted(_wordings(material, one))) for one in told]
    examples = [material.example(one.sample, wording, one.tokens) for one, found in wordings for wording in found]
    likely = iter(zip(log_likelihoods(material.model, examples), examples, strict=True))
    best = []
    for one, found in wordings:
        rows = [next(likely) for _ in found]
        if rows:
            example = max(rows, key=lambda row: row[0])[1]
            best.append(replace(departing(material, one.tokens, example), said=None))
    return best


def _wordings(material: EditDataset, told: Told) -> set[str]:
    language = material.language
    wanted = _words(told.mentions) & told.present
    found = {told.sample.caption} if (told.sample.language or "en") == language else set()
    captions = {told.caption}
    for _ in told.wrong:
        captions = {shorter for caption in captions for shorter in _without_first(material, told, caption)}
    found |= captions
    if len(told.wrong) == len(told.missed) == 1:
        found.add(replaced(told.caption, [(told.wrong[0], told.missed[0])], language))
    return {caption for caption in found if wanted <= _words(material.named(caption)) <= told.present}


def _without_first(material: EditDataset, told: Told, caption: str) -> Iterator[str]:
    """Yield the caption without its first noun that is not there."""
    wrong = next((mention for mention in material.named(caption) if mention.concept not in told.present), None)
    if wrong is not None:
        yield from without(caption, wrong, material.language)


def _others(material: EditDataset, told: Told, words: set[str]) -> list[Example]:
    """Return the caption without a hallucinated word that it rightly names, as what would be wrong to say."""
    mention = next(mention for mention in told.mentions if mention.concept in words)
    found = sorted(without(told.caption, mention, material.language))
    return [departing(material, told.tokens, material.example(told.sample, caption, told.tokens)) for caption in found]


def _few(told: Sequence[Told], words: set[str], most: int) -> list[Told]:
    """Return those that name a word that fewer than `most` before them name."""
    counts = Counter[str]()
    found = []
    for one in told:
        named = words & _words(one.mentions)
        if any(counts[word] < most for word in named):
            found.append(one)
            counts.update(named)
    return found


def _words(mentions: Iterable[Mention]) -> set[str]:
    return {mention.concept for mention in mentions}
