"""Ask about an image as it is, with its embedding moved between concepts, and moved as far where it should not matter.

`one step` and `steps` follow the detector's gradient from source to target within the variation of embeddings, `plain
steps` the plain gradient. `unrelated` moves between two concepts that the question is not about. `random` goes in any
direction, `random in place` as far in each patch as `steps`, `random natural` with the covariance of embeddings. These
moves are as long as `steps`. `sign step` is the published one. It and its controls, `sign step unrelated` and `sign
step random`, move every entry by the same amount.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.detector.joint import JointModel
from mmray.errors import InputError
from mmray.features.hallucination.perturb import (
    Covariance,
    Embedding,
    moved,
    moved_at_random,
    relative_norms,
    rescaled,
    sign_step,
    sign_step_at_random,
)
from mmray.features.hallucination.settings import MoveSettings, PerturbationSettings
from mmray.models.prompting import prompt_text
from mmray.objects.answers import value_of
from mmray.objects.prompts import presence

ANSWER = 16
"""Maximum tokens of an answer."""
ORIGINAL = "original"


@dataclass(frozen=True)
class Move:
    """The concepts of one image's moves, and one that no move is about."""

    source: str
    target: str
    unrelated: tuple[str, str]
    apart: str | None
    """None where the data has no other."""


def drawn_move(sample: Sample, vocabulary: Sequence[str], settings: PerturbationSettings) -> Move | None:
    """Return the settings' concepts; those not given are drawn from the objects of the image and of the data.

    None where the image leaves nothing to draw. Raises InputError where no image can have a control.
    """
    # Seeded by the sample, so that its concepts don't depend on which shard it is in.
    generator = random.Random(f"{settings.seed} {sample.sample_id}")
    objects = sorted(name.casefold() for name in sample.objects or ())
    given = [_spelt(name, vocabulary) for name in (settings.source, settings.target, *(settings.unrelated or ()))]
    own = [name for name in objects if name not in given]
    source = given[0] or (generator.choice(own) if own else None)
    lacking = [name for name in vocabulary if name not in objects and name not in given]
    # At most three: the target, and two for the control's ends and the object that no move is about.
    drawn = generator.sample(lacking, min(3, len(lacking)))
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
    # With a further object left, `other` is the one no move is about; else it has to end the control.
    return Move(source, target, (one, generator.choice(left) if left else other), other if left else None)


def _spelt(name: str | None, vocabulary: Sequence[str]) -> str | None:
    """Return a name as the data spells it, if the data has it."""
    return name.casefold() if name is not None and name.casefold() in vocabulary else name


@dataclass(frozen=True, eq=False)
class Perturber:
    """Asks a joint model about embeddings under every condition."""

    joint: JointModel
    settings: MoveSettings
    moves: Callable[[Sample], Sequence[Move]]
    """The moves of a sample's image."""
    varying: Covariance
    """Of the data's embeddings."""

    def rows(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[dict[str, Any]]:
        """Return a row per image, condition and question. Images without concepts to move between have none."""
        rows: list[dict[str, Any]] = []
        embeddings: list[Embedding] = []
        shown: list[Image] = []
        for sample, image in zip(samples, images, strict=True):
            moves = self.moves(sample)
            if not moves:
                continue
            embedding = self.joint.embed(self.joint.pixels([image]))
            tried = [(move, self.conditions(embedding, move, sample.sample_id)) for move in moves]
            # Questions of all images are asked together below, in full batches.
            for move, condition, other in ((move, *item) for move, found in tried for item in found.items()):
                confidences = self.joint.confidences(other, [move.source, move.target])[0].tolist()
                ((norm, relative),) = relative_norms(embedding, other, self.joint.tower.skipped)
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
                            "source_confidence": confidences[0],
                            "target_confidence": confidences[1],
                        }
                    )
                    embeddings.append(other)
                    shown.append(image)
        if rows:
            prompts = [prompt_text(self.joint.model, row["question"], None) for row in rows]
            replies = self.joint.replies(prompts, shown, torch.cat(embeddings), self.settings.batch_size, ANSWER)
            for row, (tokens, _) in zip(rows, replies, strict=True):
                row["reply"] = str(self.joint.model.tokenizer.decode(tokens)).strip()
                row["value"] = value_of(row["reply"], self.settings.parse)
        return rows

    def conditions(self, embedding: Embedding, move: Move, sample_id: str) -> dict[str, Embedding]:
        """Return the embedding under every condition."""
        settings, joint, varying = self.settings, self.joint, self.varying
        seed = random.Random(f"{settings.seed} {sample_id}").getrandbits(31)

        def between(source: str, target: str, steps: int, *, plain: bool = False) -> Embedding:
            return moved(joint, embedding, source, target, settings.norm, steps, varying, plain=plain, seed=seed)

        reference = between(move.source, move.target, settings.steps)
        found = {
            ORIGINAL: embedding,
            "steps": reference,
            "one step": rescaled(embedding, between(move.source, move.target, 1), reference),
            "plain steps": rescaled(
                embedding, between(move.source, move.target, settings.steps, plain=True), reference
            ),
            "unrelated": rescaled(embedding, between(*move.unrelated, settings.steps), reference),
        }
        for number in range(1, settings.randoms + 1):
            # The three kinds share one draw of noise, so that only its placing and its covariance differ.
            own = seed + number
            found[f"random {number}"] = moved_at_random(joint, embedding, reference, own)
            found[f"random in place {number}"] = moved_at_random(joint, embedding, reference, own, in_place=True)
            found[f"random natural {number}"] = moved_at_random(joint, embedding, reference, own, varying=varying)
        if settings.sign_step is not None:
            found["sign step"] = sign_step(joint, embedding, move.source, move.target, settings.sign_step)
            found["sign step unrelated"] = sign_step(joint, embedding, *move.unrelated, settings.sign_step)
            for number in range(1, settings.randoms + 1):
                found[f"sign step random {number}"] = sign_step_at_random(embedding, settings.sign_step, seed + number)
        return found

    def questions(self, move: Move) -> list[tuple[str, str]]:
        """Return each question with what it is about."""
        if self.settings.question:
            return [("question", question) for question in self.settings.question]
        names = {"source": move.source, "target": move.target, "unrelated": move.apart}
        return [(about, presence(name)) for about, name in names.items() if name is not None]
