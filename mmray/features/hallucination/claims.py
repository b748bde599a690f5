"""What a model claims to see, in captions and in answers, with the detector's and its own confidence in each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.data.samples import Sample
from mmray.detector.boxes import in_image
from mmray.detector.joint import JointModel
from mmray.features.hallucination.mistakes import object_under
from mmray.models.generation import caption_of
from mmray.models.norms import log_probability, vocabulary_logits
from mmray.models.options import LONGEST
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.token_positions import locate_mentions
from mmray.objects.answers import says_yes
from mmray.objects.lexicon import ObjectLexicon, objects_of
from mmray.objects.pope_files import PopeQuestion
from mmray.objects.prompts import presence
from mmray.objects.statistics import STRATEGIES, ObjectStatistics, choose_pope_objects

ANSWER = 8
"""Maximum tokens of an answer to a yes/no question."""

Claim = dict[str, Any]
"""A row of the table `claims`, with its row in the batch as `row` while it is being made."""


@dataclass(frozen=True, eq=False)
class ClaimCollector:
    """Collects a joint model's claims about samples whose objects are known."""

    joint: JointModel
    statistics: ObjectStatistics
    lexicon: ObjectLexicon
    prompt: str | None
    prefix: str | None
    questions: int
    """Present objects per image to ask about, and as many absent ones of each kind."""
    seed: int
    batch_size: int
    longest: int = LONGEST
    """Maximum tokens of a caption."""
    released: Mapping[str, Sequence[PopeQuestion]] | None = None
    """Questions to ask instead of drawn ones, by the sample's id."""

    def claims(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[Claim]:
        """Return a row per known object that the model's captions name, and a row per question.

        Other words of captions are no claims, because the data does not say whether they are true.
        """
        embedding = self.joint.embed(self.joint.pixels(images))
        # One embedding serves captions, answers and the detector: all three see the same.
        rows = self._captions(samples, images, embedding) + self._answers(samples, images, embedding)
        if rows:
            self._add_detections(rows, samples, images, embedding)
        return [{name: value for name, value in row.items() if name != "row"} for row in rows]

    def _captions(
        self, samples: Sequence[Sample], images: Sequence[Image], embedding: Float[Tensor, "row patch width"]
    ) -> list[Claim]:
        """Write captions, and return the first mention of each object with the log-probability of its tokens."""
        model = self.joint.model
        prompts = [prompt_text(model, self.prompt, sample.language, prefix=self.prefix) for sample in samples]
        replies = self.joint.replies(prompts, images, embedding, self.batch_size, self.longest)
        generated, states = zip(*replies, strict=True)
        texts, offsets = zip(*(caption_of(model, tokens) for tokens in generated), strict=True)
        batch = encode(model, prompts, images, generated, offsets)
        rows: list[Claim] = []
        positions = []
        for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            # Reversed, so that the first mention of an object is the one that stays.
            mentions = {mention.concept: mention for mention in reversed(self.lexicon.mentions(text, sample.language))}
            for concept, mention in mentions.items():
                positions.append(locate_mentions(batch, row, sample.sample_id, [mention], every=True))
                rows.append(_claim(row, sample, "caption", concept, text, claimed=True))
        pieces = [position for own in positions for position in own]
        if pieces:
            # A token is predicted one position earlier; the caption's first one, at the prompt's last position.
            steps = [piece.position - batch.caption_start[piece.row] + 1 for piece in pieces]
            hidden = torch.stack([states[piece.row][step] for piece, step in zip(pieces, steps, strict=True)])
            # A noun's log-probability is the sum over its tokens, each given those before it.
            found = log_probability(model, hidden, torch.tensor([piece.token for piece in pieces], dtype=torch.long))
            for claim, own in zip(rows, torch.split(found, [len(own) for own in positions]), strict=True):
                claim["log_prob"] = float(own.sum())
        return rows

    def _answers(
        self, samples: Sequence[Sample], images: Sequence[Image], embedding: Float[Tensor, "row patch width"]
    ) -> list[Claim]:
        """Ask about present and absent objects, with the log-probability of yes against no."""
        asked = [pair for row, sample in enumerate(samples) for pair in self._questions(row, sample)]
        rows = [claim for claim, _ in asked]
        if not rows:
            return rows
        # Questions are batched over images, so an image has as many rows as questions.
        model, index = self.joint.model, [row["row"] for row in rows]
        prompts = [prompt_text(model, question, None) for _, question in asked]
        replies = self.joint.replies(prompts, [images[row] for row in index], embedding[index], self.batch_size, ANSWER)
        for claim, prompt, (tokens, states) in zip(rows, prompts, replies, strict=True):
            claim["text"] = str(model.tokenizer.decode(tokens)).strip()
            claim["claimed"], claim["log_prob"] = says_yes(claim["text"]), self._yes_log_prob(prompt, states[0])
        return rows

    def _questions(self, row: int, sample: Sample) -> list[tuple[Claim, str]]:
        """Return a sample's questions with their claims, which the answers complete."""
        if self.released is not None:
            # The files of several strategies share their questions about present objects: each is asked once.
            once = {question.text: question for question in reversed(self.released.get(sample.sample_id, ()))}
            return [
                (
                    _claim(row, sample, "present" if one.present else one.strategy, one.thing, "", claimed=False)
                    | {"present": one.present},
                    one.text,
                )
                for one in once.values()
            ]
        objects = objects_of(sample) or frozenset()
        present, absent = choose_pope_objects(
            self.statistics, objects, self.questions, f"{self.seed} {sample.sample_id}"
        )
        kinds = dict.fromkeys(present, "present")
        for strategy in STRATEGIES:
            # An object that two strategies choose is asked about once, as the first one's.
            kinds = dict.fromkeys(absent[strategy], strategy) | kinds
        return [(_claim(row, sample, kind, word, "", claimed=False), presence(word)) for word, kind in kinds.items()]

    def _yes_log_prob(self, prompt: str, hidden: Float[Tensor, " hidden"]) -> float:
        """Return log(p(yes) / (p(yes) + p(no))) of the answer's first token, from the state that predicts it."""
        model = self.joint.model
        yes, no = (tokenize_caption(model, prompt, answer)[0] for answer in ("Yes", "No"))
        # Some tokenizers begin both words with a token for the blank; the first tokens that differ tell them apart.
        first = next(([one, other] for one, other in zip(yes, no, strict=False) if one != other), [yes[0], no[0]])
        return float(vocabulary_logits(model, hidden[None])[0, first].float().log_softmax(dim=0)[0])

    def _add_detections(
        self,
        rows: Sequence[Claim],
        samples: Sequence[Sample],
        images: Sequence[Image],
        embedding: Float[Tensor, "row patch width"],
    ) -> None:
        """Add the detector's confidence and best box to each claim, and to wrong ones the object that is there."""
        words = sorted({row["word"] for row in rows} | {name for s in samples for name in objects_of(s) or ()})
        # One pass for all words of the batch: a query is cheap next to the embedding.
        with torch.no_grad():
            found = self.joint.detect(embedding, words)
        best = found.logits.max(dim=1)
        for row in rows:
            number, query = row["row"], words.index(row["word"])
            row["confidence"] = float(best.values[number, query].sigmoid())
            box = found.boxes[number, best.indices[number, query]].double()
            row["box"] = in_image(box, self.joint.tower.covers(images[number].size)).tolist()
            row["mistaken_for"], row["mistaken_box"] = None, None
            if row["claimed"] and not row["present"]:
                sample = samples[number]
                # Objects without a box, which come last, can't be compared.
                boxed = list(zip(sample.objects or (), sample.boxes or (), strict=False))
                row["mistaken_for"], row["mistaken_box"] = object_under(row["box"], boxed)


def _claim(row: int, sample: Sample, kind: str, word: str, text: str, *, claimed: bool) -> Claim:
    return {
        "row": row,
        "sample_id": sample.sample_id,
        "image": sample.image_key,
        "kind": kind,
        "word": word,
        "claimed": claimed,
        "present": word in (objects_of(sample) or ()),
        "text": text,
    }
