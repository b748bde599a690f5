"""What a model claims to see, in captions and in answers, with the detector's and its own confidence in each claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.data.samples import Sample
from mmray.detector.joint import JointModel
from mmray.features.hallucination.mistakes import Box, stands_at
from mmray.features.hallucination.questions import replies
from mmray.models.generation import caption_of
from mmray.models.norms import log_probability, vocabulary_logits
from mmray.models.options import LONGEST
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.token_positions import place_mentions
from mmray.objects.answers import says_yes
from mmray.objects.naming import ObjectLexicon, objects_of
from mmray.objects.prompts import presence
from mmray.objects.statistics import STRATEGIES, ObjectStatistics, asked_objects

ANSWER = 8
"""Tokens at most of an answer to a yes/no question."""


@dataclass(frozen=True, eq=False)
class Claimant:
    """A joint model that is asked about samples whose objects are known."""

    joint: JointModel
    facts: ObjectStatistics
    naming: ObjectLexicon
    prompt: str | None
    prefix: str | None
    questions: int
    """Present objects of an image that are asked for, and as many absent ones of each kind."""
    seed: int
    batch_size: int
    longest: int = LONGEST
    """Tokens at most in a caption."""

    def claims(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[dict[str, Any]]:
        """Return a row for every object of the data that the model's captions name, and for every question.

        What else captions name is no claim: whether it is there is not known.
        """
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
        prompts = [prompt_text(model, self.prompt, sample.language, prefix=self.prefix) for sample in samples]
        replied = replies(self.joint, prompts, images, embedding, self.batch_size, self.longest)
        written, states = zip(*replied, strict=True)
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
        if every:
            steps = [place.position - batch.caption_start[place.row] + 1 for place in every]
            hidden = torch.stack([states[place.row][step] for place, step in zip(every, steps, strict=True)])
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
        for claim, prompt, (tokens, states) in zip(rows, prompts, written, strict=True):
            claim["text"] = str(model.tokenizer.decode(tokens)).strip()
            claim["claimed"], claim["log_prob"] = says_yes(claim["text"]), self._yes_against_no(prompt, states[0])
        return rows

    def _row(self, row: int, sample: Sample, kind: str, word: str, text: str, *, claimed: bool) -> dict[str, Any]:
        objects = objects_of(sample) or frozenset()
        return {
            "row": row,
            "sample_id": sample.sample_id,
            "image": sample.image_key,
            "kind": kind,
            "word": word,
            "claimed": claimed,
            "present": word in objects,
            "text": text,
        }

    def _yes_against_no(self, prompt: str, hidden: Float[Tensor, " hidden"]) -> float:
        """Return log(p(yes) / (p(yes) + p(no))), by the first token of either word, where the answer's is predicted."""
        model = self.joint.model
        words = [tokenize_caption(model, prompt, answer)[0] for answer in ("Yes", "No")]
        # Where the two begin alike, with a blank, what tells them apart comes behind it.
        first = next((tokens for tokens in zip(*words, strict=False) if tokens[0] != tokens[1]), None)
        both = vocabulary_logits(model, hidden[None])[0, list(first or (words[0][0], words[1][0]))]
        return float(both.float().log_softmax(dim=0)[0])

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
