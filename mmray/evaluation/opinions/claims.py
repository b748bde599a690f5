"""What a model claims to see, in captions and in answers, with the detector's and its own confidence in each claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.datasets.samples import Sample
from mmray.evaluation.asking import replies
from mmray.evaluation.facts import STRATEGIES, DataFacts
from mmray.evaluation.hallucination import asked_objects, says_yes
from mmray.evaluation.naming import Naming
from mmray.evaluation.opinions.mistakes import Box, stands_at
from mmray.evaluation.prompts import presence
from mmray.evaluation.scope import objects_of
from mmray.models.capture import tap_input
from mmray.models.generation import caption_of
from mmray.models.norms import log_probability, vocabulary_logits
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.places import place_mentions
from mmray.perception.joint import JointModel

ANSWER = 8
"""Tokens at most of an answer to a yes/no question."""


@dataclass
class Claims:
    """The rows of one unit of work: claims, and samples that could not be used."""

    claims: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Claimant:
    """A joint model that is asked about samples whose objects are known."""

    joint: JointModel
    facts: DataFacts
    naming: Naming
    prompt: str | None
    questions: int
    """Present objects of an image that are asked for, and as many absent ones of each kind."""
    seed: int
    batch_size: int

    def claims(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[dict[str, Any]]:
        """Return a row for every noun of the captions that the model writes, and for every question."""
        embedding = self.joint.embed(self.joint.pixels(images))
        named = self._captions(samples, images, embedding) + self._answers(samples, images, embedding)
        if named:
            self._second(named, samples, images, embedding)
        return [{name: value for name, value in row.items() if name != "row"} for row in named]

    def _captions(
        self, samples: Sequence[Sample], images: Sequence[Image], embedding: Float[Tensor, "row place width"]
    ) -> list[dict[str, Any]]:
        """Write captions, and return the first mention of each object in each, with its log-probability."""
        model = self.joint.model
        prompts = [prompt_text(model, self.prompt, sample.language) for sample in samples]
        written = replies(self.joint, prompts, images, embedding, self.batch_size)
        texts, offsets = zip(*(caption_of(model, tokens) for tokens in written), strict=True)
        batch = encode(model, prompts, images, written, offsets)
        rows: list[dict[str, Any]] = []
        places = []
        for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            mentions = {mention.concept: mention for mention in reversed(self.naming.mentions(text, sample.language))}
            for concept, mention in mentions.items():
                places.append(place_mentions(batch, row, sample.sample_id, [mention], every=True))
                rows.append(self._row(row, sample, "caption", concept, text, claimed=True))
        every = [place for pieces in places for place in pieces]
        hidden = self._hidden(batch, embedding, [(place.row, place.position) for place in every])
        found = log_probability(model, hidden, torch.tensor([place.token for place in every], dtype=torch.long))
        for claim, own in zip(rows, torch.split(found, [len(pieces) for pieces in places]), strict=True):
            claim["log_prob"] = float(own.sum())
        return rows

    def _answers(
        self, samples: Sequence[Sample], images: Sequence[Image], embedding: Float[Tensor, "row place width"]
    ) -> list[dict[str, Any]]:
        """Ask for objects that are there and for some that are not, with the log-probability of yes against no."""
        rows: list[dict[str, Any]] = []
        for row, sample in enumerate(samples):
            objects = objects_of(sample) or frozenset()
            seed = f"{self.seed} {sample.sample_id}"
            present, absent = asked_objects(self.facts, objects, self.questions, seed)
            asked = dict.fromkeys(present, "present")
            for strategy in STRATEGIES:
                asked = dict.fromkeys(absent[strategy], strategy) | asked
            for word, kind in asked.items():
                rows.append(self._row(row, sample, kind, word, "", claimed=False))
        if not rows:
            return rows
        model, index = self.joint.model, [row["row"] for row in rows]
        prompts = [prompt_text(model, presence(row["word"]), None) for row in rows]
        shown, seen = [images[row] for row in index], embedding[index]
        written = replies(self.joint, prompts, shown, seen, self.batch_size, ANSWER)
        odds = self._yes_against_no(prompts, shown, seen)
        for claim, tokens, chance in zip(rows, written, odds, strict=True):
            claim["text"] = str(model.tokenizer.decode(tokens)).strip()
            claim["claimed"], claim["log_prob"] = says_yes(claim["text"]), chance
        return rows

    def _row(self, row: int, sample: Sample, kind: str, word: str, text: str, *, claimed: bool) -> dict[str, Any]:
        objects = objects_of(sample) or frozenset()
        return {
            "row": row,
            "sample_id": sample.sample_id,
            "kind": kind,
            "word": word,
            "claimed": claimed,
            "present": word in objects,
            "text": text,
        }

    @torch.no_grad()
    def _hidden(
        self, batch: Batch, embedding: Float[Tensor, "row place width"], places: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "place hidden"]:
        """Return the input of the final norm at these rows and positions; logits of all of them would fill a memory."""
        states: list[Tensor] = []
        with tap_input(self.joint.model.norm, states.append):
            self.joint.model.network(**self.joint.inputs(batch, embedding), use_cache=False, logits_to_keep=1)
        rows, positions = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(dim=1)
        return states[0][rows.to(states[0].device), positions.to(states[0].device)]

    def _yes_against_no(
        self, prompts: Sequence[str], images: Sequence[Image], embedding: Float[Tensor, "row place width"]
    ) -> list[float]:
        """Return log(p(yes) / (p(yes) + p(no))) of each question, by the first token of either word."""
        found: list[float] = []
        model = self.joint.model
        words = [[tokenize_caption(model, prompt, answer)[0] for answer in ("Yes", "No")] for prompt in prompts]
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            none: list[list[int]] = [[] for _ in prompts[part]]
            batch = encode(model, prompts[part], images[part], none, [[] for _ in none])
            answers = [(row, start - 1) for row, start in enumerate(batch.caption_start)]
            said = vocabulary_logits(model, self._hidden(batch, embedding[part], answers)).float().cpu()
            for row, pair in enumerate(words[part]):
                # Where the two begin alike, with a blank, what tells them apart comes behind it.
                first = next((tokens for tokens in zip(*pair, strict=False) if tokens[0] != tokens[1]), None)
                both = said[row, list(first or (pair[0][0], pair[1][0]))]
                found.append(float(both.log_softmax(dim=0)[0]))
        return found

    def _second(
        self,
        rows: Sequence[dict[str, Any]],
        samples: Sequence[Sample],
        images: Sequence[Image],
        embedding: Float[Tensor, "row place width"],
    ) -> None:
        """Add the detector's confidence in each claim, its best box, and to those that are wrong what stands there."""
        words = sorted({row["word"] for row in rows} | {name for s in samples for name in objects_of(s) or ()})
        with torch.no_grad():
            found = self.joint.detect(embedding, words)
        best = found.logits.max(dim=1)
        for row in rows:
            number, query = row["row"], words.index(row["word"])
            row["confidence"] = float(best.values[number, query].sigmoid())
            covers = self.joint.sight.covers(images[number].size)
            row["box"] = _placed(found.boxes[number, best.indices[number, query]].tolist(), covers)
            row["mistaken_for"], row["mistaken_box"] = None, None
            if row["claimed"] and not row["present"]:
                row["mistaken_for"], row["mistaken_box"] = stands_at(row["box"], self._objects(samples[number]))

    def _objects(self, sample: Sample) -> list[tuple[str, Box]]:
        """Return a sample's objects that have boxes, each with its own."""
        return [(name, tuple(box)) for name, box in zip(sample.objects or (), sample.boxes or (), strict=False)]


def _placed(box: Sequence[float], covers: Sequence[float]) -> list[float]:
    """Return a box of what the tower sees as one of the whole image."""
    return [
        covers[0] + box[0] * covers[2],
        covers[1] + box[1] * covers[3],
        box[2] * covers[2],
        box[3] * covers[3],
    ]
