"""Ask about an image as it is, moved from one concept to another, and moved as far where it should not matter.

`one step` and `steps` go along the detector's gradient from source to target, of embeddings as they vary, `plain steps`
along the gradient as it is, and `unrelated` between two things that have nothing to do with the question. `random` goes
in any direction, `random in place` as far in each patch as `steps` went, `random natural` as embeddings vary. All go as
far as `steps`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.data.samples import Sample
from mmray.detector.joint import JointModel
from mmray.errors import InputError
from mmray.features.hallucination.perturb import Covariance, as_far, confidences, moved, moved_at_random, relative_norms
from mmray.features.hallucination.questions import replies
from mmray.features.hallucination.settings import PerturbationSettings
from mmray.models.prompting import prompt_text
from mmray.objects.answers import value_of
from mmray.objects.prompts import presence

ANSWER = 16
"""Tokens at most of an answer."""
ORIGINAL = "original"

Embedding = Float[Tensor, "row place width"]


@dataclass(frozen=True)
class Move:
    """What is moved to what in one image, two things that have nothing to do with it, and one that no move is about."""

    source: str
    target: str
    unrelated: tuple[str, str]
    apart: str | None
    """None where the data has no other."""


def drawn_move(sample: Sample, vocabulary: Sequence[str], settings: PerturbationSettings) -> Move | None:
    """Return what the settings say, or else draw it from the image's objects and the data's.

    None where there is nothing to draw. Raises InputError where no image can have a control.
    """
    draw = random.Random(f"{settings.seed} {sample.sample_id}")
    objects = sorted(name.casefold() for name in sample.objects or ())
    given = [_spelt(name, vocabulary) for name in (settings.source, settings.target, *(settings.unrelated or ()))]
    own = [name for name in objects if name not in given]
    source = given[0] or (draw.choice(own) if own else None)
    lacking = [name for name in vocabulary if name not in objects and name not in given]
    drawn = draw.sample(lacking, min(3, len(lacking)))
    target = given[1] or (drawn.pop() if drawn else None)
    if source is None or target is None:
        return None
    if settings.unrelated:
        one, other = map(str, given[2:])
        apart = next((name for name in (*drawn, *lacking) if name not in (target, one, other)), None)
        return Move(source, target, (one, other), apart)
    if len(drawn) < 2:
        if len([name for name in vocabulary if name not in (source, target)]) < 2:
            raise InputError("the data has no two other objects to move between as a control; name two by --unrelated")
        return None  # this image shows all others, or all but one
    one, other = drawn[:2]
    left = [name for name in lacking if name not in (target, one, other)]
    return Move(source, target, (one, draw.choice(left) if left else other), other if left else None)


def _spelt(name: str | None, vocabulary: Sequence[str]) -> str | None:
    """Return a name as the data spells it, if it has it."""
    return name.casefold() if name is not None and name.casefold() in vocabulary else name


@dataclass(frozen=True, eq=False)
class Mover:
    """A joint model and how its embeddings are moved."""

    joint: JointModel
    settings: PerturbationSettings
    vocabulary: tuple[str, ...]
    varying: Covariance
    """How the data's embeddings vary."""

    def rows(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[dict[str, Any]]:
        """Return a row for every question about every move of every image that has something to move."""
        rows: list[dict[str, Any]] = []
        seen: list[Embedding] = []
        shown: list[Image] = []
        for sample, image in zip(samples, images, strict=True):
            move = drawn_move(sample, self.vocabulary, self.settings)
            if move is None:
                continue
            embedding = self.joint.embed(self.joint.pixels([image]))
            for condition, there in self.moves(embedding, move, sample.sample_id).items():
                sure = confidences(self.joint, there, [move.source, move.target])[0].tolist()
                ((norm, relative),) = relative_norms(embedding, there, self.joint.sight.skipped)
                for about, question in self.questions(move):
                    rows.append(
                        {
                            "sample_id": sample.sample_id,
                            "image": sample.image_key,
                            "condition": condition,
                            "source": move.source,
                            "target": move.target,
                            "about": about,
                            "question": question,
                            "norm": norm,
                            "relative_norm": relative,
                            "source_confidence": sure[0],
                            "target_confidence": sure[1],
                        }
                    )
                    seen.append(there)
                    shown.append(image)
        if rows:
            prompts = [prompt_text(self.joint.model, row["question"], None) for row in rows]
            written = replies(self.joint, prompts, shown, torch.cat(seen), self.settings.batch_size, ANSWER)
            for row, (tokens, _) in zip(rows, written, strict=True):
                row["reply"] = str(self.joint.model.tokenizer.decode(tokens)).strip()
                row["value"] = value_of(row["reply"], self.settings.parse)
        return rows

    def moves(self, embedding: Embedding, move: Move, sample_id: str) -> dict[str, Embedding]:
        """Return the embedding under every condition."""
        settings, joint, varying = self.settings, self.joint, self.varying
        seed = random.Random(f"{settings.seed} {sample_id}").getrandbits(31)

        def go(source: str, target: str, steps: int, *, plain: bool = False) -> Embedding:
            return moved(joint, embedding, source, target, settings.norm, steps, varying, plain=plain, seed=seed)

        there = go(move.source, move.target, settings.steps)
        found = {
            ORIGINAL: embedding,
            "steps": there,
            "one step": as_far(embedding, go(move.source, move.target, 1), there),
            "plain steps": as_far(embedding, go(move.source, move.target, settings.steps, plain=True), there),
            "unrelated": as_far(embedding, go(*move.unrelated, settings.steps), there),
        }
        for number in range(1, settings.randoms + 1):
            drawn = seed + number
            found[f"random {number}"] = moved_at_random(joint, embedding, there, drawn)
            found[f"random in place {number}"] = moved_at_random(joint, embedding, there, drawn, in_place=True)
            found[f"random natural {number}"] = moved_at_random(joint, embedding, there, drawn, varying=varying)
        return found

    def questions(self, move: Move) -> list[tuple[str, str]]:
        """Return what each question is about, and its words."""
        if self.settings.question:
            return [("question", question) for question in self.settings.question]
        asked = {"source": move.source, "target": move.target, "unrelated": move.apart}
        return [(about, presence(name)) for about, name in asked.items() if name is not None]
