"""Evaluate an edit of a loaded model on samples, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmray.data.samples import Failure, Sample
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.edit_requests import EDITED
from mmray.features.evaluation.evaluator import EditEvaluator
from mmray.features.evaluation.held_out_text import held_out_texts
from mmray.features.evaluation.mmedit import read_records
from mmray.features.evaluation.pope import open_pope
from mmray.features.evaluation.queries import Edit
from mmray.features.evaluation.settings import MeasureSettings, measure_settings
from mmray.features.evaluation.summary import summarise
from mmray.models.loading import LoadedModel
from mmray.objects.ground_truth import captions_by_image, with_ground_truth
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.prompts import TextQuestion, read_text_questions, text_questions
from mmray.objects.statistics import ObjectStatistics, gather_statistics
from mmray.objects.words import open_words, table_for


@dataclass(frozen=True)
class Evaluated:
    """The measures of an edit, the captions before and after it, what could not be measured, and the seconds taken."""

    measures: dict[str, dict[str, Any]]
    captions: pa.Table
    errors: pa.Table
    seconds: float


def evaluate(
    model: LoadedModel,
    edit: Edit,
    samples: Sequence[Sample | Failure],
    settings: MeasureSettings | None = None,
    *,
    baseline: BaselineReplies | None = None,
    own: Sequence[Sample | Failure] = (),
    statistics: ObjectStatistics | None = None,
) -> Evaluated:
    """Measure an edit on samples before and after it.

    Samples whose image the edit was made on count for its reliability. So do the samples `own`, unless their images are
    among these. `baseline` keeps the unedited model's replies: with one object for many edits, each costs little more
    than its own replies. `statistics` are of the data's objects, with translations; by default those of the samples.
    """
    began = time.perf_counter()
    readable = [sample for sample in samples if isinstance(sample, Sample)]
    annotated = statistics or gather_statistics(sample.objects for sample in readable)
    settings = _resolved(settings or measure_settings(), annotated, readable)
    baseline = baseline or BaselineReplies(model, settings.batch_size, settings.prompt, settings.longest)
    statistics = statistics or _statistics(annotated, settings, readable)
    evaluator = EditEvaluator(baseline, edit, statistics, settings)
    texts = text_questions_of(settings, statistics, evaluator.requests.words)
    held_out = held_out_texts(settings.text_count, settings.seed)
    parts = [evaluator.samples(samples), evaluator.texts(texts), evaluator.held_out(held_out)]
    if settings.mmedit:
        parts.append(evaluator.records(read_records(settings.mmedit, settings.mmedit_images)))
    if settings.pope:
        parts.append(evaluator.released(open_pope(settings.pope, settings.pope_images)))
    if own:
        # An own image that is among the samples counts there, and not twice.
        known = {row["image"] for row in parts[0].captions if row["role"] == EDITED}
        others = [sample for sample in own if not isinstance(sample, Sample) or sample.image_key not in known]
        if not {sample.sample_id for sample in samples}.isdisjoint(sample.sample_id for sample in others):
            # Ids of the edit's data may be those of other images here, and replies are known by id.
            own_baseline = BaselineReplies(model, settings.batch_size, settings.prompt, settings.longest)
            evaluator = EditEvaluator(own_baseline, edit, statistics, settings)
        parts.append(evaluator.samples(others, own=True))
    tables = [part.tables() for part in parts]
    whole = {name: pa.concat_tables([table[name] for table in tables]) for name in tables[0]}
    measures = summarise(whole["measurements"], settings)
    return Evaluated(measures, whole["captions"], whole["errors"], time.perf_counter() - began)


def _resolved(settings: MeasureSettings, statistics: ObjectStatistics, samples: Sequence[Sample]) -> MeasureSettings:
    """Return the settings with the defaults of ground truth and synonyms that these samples need."""
    captioned = any(sample.references and sample.objects is not None for sample in samples)
    # The defaults of `survey`, which reads a source, for samples in memory.
    truth = settings.ground_truth or ("union" if captioned else "instances")
    synonyms = table_for(settings.synonyms, statistics.vocabulary)
    return settings.model_copy(update={"ground_truth": truth, "synonyms": synonyms})


def _statistics(annotated: ObjectStatistics, settings: MeasureSettings, samples: Sequence[Sample]) -> ObjectStatistics:
    """Return the object statistics of these samples under the settings' ground truth."""
    lexicon = ObjectLexicon(annotated.vocabulary, {}, open_words(settings.synonyms, annotated.vocabulary))
    truth = settings.ground_truth or "instances"
    references = captions_by_image((s.image_key, s.caption) for s in samples) if truth != "instances" else {}
    objects = (with_ground_truth(sample, truth, lexicon, references).objects for sample in samples)
    return gather_statistics(objects, vocabulary=annotated.vocabulary, references=references)


def text_questions_of(
    settings: MeasureSettings, statistics: ObjectStatistics, words: frozenset[str]
) -> list[TextQuestion]:
    """Return the questions without an image: those of the settings' file, or about the data's objects."""
    if settings.text_questions:
        return read_text_questions(settings.text_questions)
    return text_questions(statistics, words, settings.text_count, settings.seed)
