"""Effects of zeroing neurons on held-out samples: the likelihood of their texts, and the accuracy of their answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.errors import ShardError
from mmray.features.census.settings import CensusSettings
from mmray.features.selectivity.masks import Mask, zeroed
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.tables import PARTS
from mmray.features.selectivity.texts import (
    LabelledText,
    Question,
    answers_of,
    by_text,
    captions_of,
    image_batches,
    in_batches,
    questions_of,
    read,
    token_positions,
)
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.neurons.split_on_oom import FAILURES, split_on_failure
from mmray.objects.answer_scores import BEGINS, AnswerScore, answer_score, score_reply

Reading: TypeAlias = tuple[Mask | None, LabelledText, Float[Tensor, "token 2"]]
"""A text under a mask: per token its negative log-likelihood in nats, and 1 if it is the top token."""


def measure_interventions(
    model: LoadedModel,
    samples: Sequence[Sample],
    masks: Sequence[Mask],
    settings: SelectivitySettings,
    census: CensusSettings,
) -> dict[str, pa.Table]:
    """Return the rows of `measurements` and `answers` for these samples, without a mask and under each one.

    nll: nats of all tokens of the caption, and their number. accuracy: the total score of the answers, and their
    number. By `begins` an answer is right if greedy generation starts with it; by other scores a reply is written.
    """

    def readings(texts: Sequence[LabelledText], batch: Batch) -> list[Reading]:
        return list(_readings(model, texts, batch, masks))

    size, by = settings.batch_size, settings.by
    captions = in_batches(model, captions_of(model, samples, by, census), size, readings)
    rows = [
        _row(mask, text.label, text.sample_id, "nll", float(tokens[:, 0].double().sum()), len(tokens))
        for found in captions
        for mask, text, tokens in found
    ]
    questions = questions_of(model, samples, by, census, settings.questions)
    scores = {label: settings.score_of(label) for label in {question.label for question in questions}}
    forced = [question for question in questions if scores[question.label] == BEGINS]
    given: dict[tuple[Mask | None, str, str], list[float]] = defaultdict(list)
    for found in in_batches(model, answers_of(model, forced, by), size, readings):
        for mask, text, tokens in found:
            # Greedy generation starts with the answer if every token is the top one after those before it, which one
            # teacher-forced pass shows.
            given[mask, text.label, text.sample_id].append(float(tokens[:, 1].all()))
    written = [question for question in questions if scores[question.label] != BEGINS]
    judged = _replies(model, written, masks, settings, {label: answer_score(name) for label, name in scores.items()})
    for mask, question, _, score in judged:
        given[mask, question.label, question.sample.sample_id].append(score)
    rows += [_row(*key, "accuracy", sum(found), len(found)) for key, found in given.items()]
    answers = [
        _mask(mask)
        | {"label": question.label, "sample_id": question.sample.sample_id, "question": question.text}
        | {"reply": reply, "score": score}
        for mask, question, reply, score in judged
    ]
    return {
        "measurements": pa.Table.from_pylist(rows, schema=PARTS["measurements"]),
        "answers": pa.Table.from_pylist(answers, schema=PARTS["answers"]),
    }


def _readings(
    model: LoadedModel, texts: Sequence[LabelledText], batch: Batch, masks: Sequence[Mask]
) -> Iterator[Reading]:
    positions = token_positions(batch, texts)
    for mask in (None, *masks):
        with zeroed(model, mask):
            found = read(model, batch, positions)
        for text, part in zip(texts, by_text(positions), strict=True):
            yield mask, text, found[part]


def _replies(
    model: LoadedModel,
    questions: Sequence[Question],
    masks: Sequence[Mask],
    settings: SelectivitySettings,
    scores: Mapping[str, AnswerScore],
) -> list[tuple[Mask | None, Question, str, float]]:
    """Return the model's greedy reply to each question under each mask, with its score by that of the label.

    Raises ShardError for a question that fails alone, in the model or in its score.
    """

    def ask(batch: Sequence[Question]) -> list[tuple[Mask | None, Question, str, float]]:
        prompts = [one.prompt for one in batch]
        images = [
            None if one.sample.image is None else decode_image(one.sample.image, one.sample.background) for one in batch
        ]
        found = []
        for mask in (None, *masks):
            with zeroed(model, mask):
                replies = generate(model, prompts, images, settings.longest)
            for one, tokens in zip(batch, replies, strict=True):
                reply = caption_of(model, tokens)[0].strip()
                found.append((mask, one, reply, score_reply(scores[one.label], one.text, reply, one.answers)))
        return found

    batches = image_batches(model, questions, lambda one: one.sample, settings.batch_size)
    return [row for batch in batches for part in split_on_failure(batch, ask, _refuse, FAILURES) for row in part]


def _refuse(question: Question, problem: str) -> None:
    raise ShardError(f"sample {question.sample.sample_id}: {problem}")


def _mask(mask: Mask | None) -> dict[str, Any]:
    return {"module": mask and mask.module, "masked": mask and mask.label, "control": mask and mask.control}


def _row(mask: Mask | None, label: str, sample_id: str, measure: str, total: float, count: int) -> dict[str, object]:
    return _mask(mask) | {
        "label": label,
        "sample_id": sample_id,
        "measure": measure,
        "total": total,
        "count": float(count),
    }
