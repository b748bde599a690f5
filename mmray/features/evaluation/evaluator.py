"""Query the model about the samples of one unit before and after an edit, and measure the differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mmray.data.samples import Failure, Sample
from mmray.features.evaluation.baseline_replies import CROPS, FLIP, BaselineReplies
from mmray.features.evaluation.chair import chair, confirmed, hallucinated, pope
from mmray.features.evaluation.comparing import compare, forced_predictions
from mmray.features.evaluation.draft_verifier import without_failures
from mmray.features.evaluation.edit_requests import UNRELATED, SampleScope, requests_of, scope_of
from mmray.features.evaluation.effects import (
    caption_effects,
    expected_caption,
    generality,
    locality,
    teacher_forced_effects,
)
from mmray.features.evaluation.held_out_text import HeldOutText, measure_held_out
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.mmedit import Records, measure_records
from mmray.features.evaluation.pope import measure_pope
from mmray.features.evaluation.quality import bleu_sums, has_bleu
from mmray.features.evaluation.queries import Change, Edit, Query, Reply, TextChange
from mmray.features.evaluation.settings import MeasureSettings
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.neurons.cloze import cloze
from mmray.objects.ground_truth import with_ground_truth
from mmray.objects.lexicon import ObjectLexicon, objects_of
from mmray.objects.pope_files import PopeFiles
from mmray.objects.prompts import TextQuestion, paraphrases, presence
from mmray.objects.statistics import ObjectStatistics, choose_pope_objects
from mmray.objects.words import open_words

QUESTIONS = ("text_generality", "text_generality_questions")
PROMPTS = ("text_generality", "text_generality_prompts")
VARIANTS = {FLIP: "image_generality_flip"} | dict.fromkeys(CROPS, "image_generality_crop")
"""Change of an image → the measure that it counts for."""

Key: TypeAlias = tuple[str, str, str]
"""Of a query."""
Drafts: TypeAlias = dict[Key, list[str]]
"""Guesses of each query's reply."""


@dataclass(frozen=True)
class _SampleQueries:
    """The queries about a sample that every edit gets; `questions` are in the order of the sample's."""

    sample: Sample
    caption: Query
    questions: tuple[Query, ...]
    present: dict[str, Query]
    """POPE's, by object."""
    absent: dict[str, dict[str, Query]]
    """POPE's, by strategy and object."""

    @property
    def pope(self) -> dict[str, Query]:
        """All of POPE's, by object."""
        return self.present | {name: query for queries in self.absent.values() for name, query in queries.items()}

    def __iter__(self) -> Iterator[Query]:
        yield from (self.caption, *self.questions, *self.pope.values())


@dataclass(frozen=True)
class _ScopedQueries:
    """A sample with what the edit should do there, and the queries needed only if it should do something."""

    common: _SampleQueries
    scope: SampleScope
    paraphrases: tuple[Query, ...]
    variants: tuple[Query, ...]

    def __iter__(self) -> Iterator[Query]:
        yield from (*self.common, *self.paraphrases, *self.variants)


class EditEvaluator:
    """Measures one edit against the replies of the unedited model."""

    def __init__(
        self, baseline: BaselineReplies, edit: Edit, statistics: ObjectStatistics, settings: MeasureSettings
    ) -> None:
        self.baseline = baseline
        self.edit = edit
        self.statistics = statistics
        self.settings = settings
        words = open_words(settings.synonyms, statistics.vocabulary)
        known = ObjectLexicon(statistics.vocabulary, statistics.translations, words)
        self.requests = requests_of(edit.purposes, known)
        edited = sorted(self.requests.words)
        self.lexicon = ObjectLexicon((*statistics.vocabulary, *edited), statistics.translations, words)
        # In CHAIR a synonym stays one (man: person), even if the edit is about that word.
        new = [word for word in edited if not known.named(word, None)]
        self.chair_lexicon = ObjectLexicon((*statistics.vocabulary, *new), statistics.translations, words)
        self.reads_images = baseline.model.parts.reads_images
        # A text may go on in other ways than the data's.
        self.bleu = has_bleu(settings.bleu) and self.reads_images
        self.detector = baseline.detector(settings.detector) if settings.detector else None
        self.encoder = baseline.encoder(settings.encoder) if settings.encoder else None

    def samples(self, samples: Sequence[Sample | Failure], *, own: bool = False) -> MeasurementBuffer:
        """Return the measurements of samples; `own`: samples of the run that the edit was made on, not of the data."""
        truth, known = self.settings.ground_truth or "instances", self.statistics.references
        readable = (sample for sample in samples if isinstance(sample, Sample))
        if self.reads_images:
            readable = (with_ground_truth(sample, truth, self.chair_lexicon, known) for sample in readable)
        else:
            triggers = frozenset[str]().union(*(request.triggers for request in self.requests.requests))
            readable = (cloze(sample, triggers) for sample in readable)
        rows = MeasurementBuffer(errors=[vars(sample) for sample in samples if isinstance(sample, Failure)])
        parts = list(within_budget(readable, lambda sample: pixels_of(self.baseline.model, sample.image), BUDGET))
        for part in parts:
            rows.extend(self._decodable(part, own))
            if len(parts) > 1:
                # Several edits share decoded images, but not if they exceed the budget together.
                self.baseline.clear_images()
        # In an order of its own: failures come stage by stage within each part that fits in memory.
        rows.errors.sort(key=lambda row: (row["source"], row["sample_id"], row["stage"]))
        return rows

    def _decodable(self, samples: Sequence[Sample], own: bool) -> MeasurementBuffer:
        """Return the measurements of samples whose decoded images fit in the budget together."""
        failures: list[Failure] = []
        kept: dict[str, Sample] = {}
        for sample in samples:
            try:
                # Decoded before any query, so that an unreadable image costs its own sample and not the batch.
                self.baseline.image(sample)
            except ValueError as error:
                failures.append(_failure(sample, "decode", f"image can't be read: {error}"))
            else:
                kept[sample.sample_id] = sample

        def drop(query: Query, reason: str) -> None:
            failures.append(_failure(kept.pop(query.sample_id), "forward", reason))

        rows = without_failures(lambda: self._measured(list(kept.values()), own), drop)
        rows.errors = [vars(failure) for failure in failures]
        return rows

    def texts(self, questions: Sequence[TextQuestion]) -> MeasurementBuffer:
        """Return the measurements of questions without an image."""
        model = self.baseline.model
        kept = {f"text: {question.name}": question for question in questions}
        failures: list[Failure] = []

        def drop(query: Query, reason: str) -> None:
            kept.pop(query.sample_id)
            failures.append(Failure(query.sample_id, "text questions", "forward", reason))

        def measured() -> MeasurementBuffer:
            rows = MeasurementBuffer()
            prompts = {name: prompt_text(model, text.question, "en", image=False) for name, text in kept.items()}
            queries = [Query(name, prompt, None, all_positions=True) for name, prompt in prompts.items()]
            replies = self.baseline.replies(queries, [[question.draft] for question in kept.values()])
            changes = compare(self.baseline.verifier, self.edit, queries, replies)
            for (name, question), change in zip(kept.items(), changes, strict=True):
                locality(rows, "text_locality_about" if question.about else "text_locality", name, [change])
            return rows

        rows = without_failures(measured, drop)
        rows.errors = [vars(failure) for failure in failures]
        return rows

    def held_out(self, texts: Sequence[HeldOutText]) -> MeasurementBuffer:
        """Return the measurements of general text without an image."""
        words = self.requests.words
        return measure_held_out(
            self.baseline, self.edit, texts, lambda text, language: bool(self.lexicon.named(text, language) & words)
        )

    def records(self, records: Records) -> MeasurementBuffer:
        """Return the measurements of MMEdit's records."""
        return measure_records(self.baseline, self.edit, records)

    def released(self, files: PopeFiles) -> MeasurementBuffer:
        """Return the measurements of POPE's released questions."""
        return measure_pope(self.baseline, self.edit, files, self.settings.pope_parser)

    def _measured(self, samples: Sequence[Sample], own: bool) -> MeasurementBuffer:
        drafts: Drafts = {}
        common = [self._common(sample, own, drafts) for sample in samples]
        # First the queries of every edit, whose replies decide what this edit should do, and so what else to query.
        self._reply([query for queries in common for query in queries], drafts)
        scoped = [self._scoped(queries, drafts) for queries in common]
        replies = self._reply([query for queries in scoped for query in queries], drafts)
        changes = compare(self.baseline.verifier, self.edit, [query for query, _ in replies], [r for _, r in replies])
        found = {query.key: change for (query, _), change in zip(replies, changes, strict=True)}
        rows = MeasurementBuffer(images={sample.sample_id: sample.image_key for sample in samples})
        for queries in scoped:
            self._add_effects(rows, queries, found)
            if not own:
                self._add_quality(rows, queries.common, found)
        self._add_teacher_forced(rows, scoped, found)
        if not own:
            self._add_similarity(rows, common, found)
        return rows

    def _reply(self, queries: Sequence[Query], drafts: Drafts) -> list[tuple[Query, Reply]]:
        """Return each query once, with the reply before the edit."""
        once = list({query.key: query for query in queries}.values())
        return list(zip(once, self.baseline.replies(once, [drafts[query.key] for query in once]), strict=True))

    def _query(
        self, drafts: Drafts, sample: Sample, question: str | None, guesses: list[str], variant: str = ""
    ) -> Query:
        # All positions serve the legacy locality of captions; kept of every query, they would fill the memory.
        query = self.baseline.query(sample, question, variant, all_positions=question is None and not variant)
        drafts.setdefault(query.key, guesses)
        return query

    def _common(self, sample: Sample, own: bool, drafts: Drafts) -> _SampleQueries:
        """Return the queries that every edit gets; of its own samples, only those that show its effect."""
        pairs = sample.questions or ()
        questions = [pair for pair in pairs if not own or self._is_affected(sample, pair[1])]
        present, absent = ([], {}) if own or not self.settings.pope_objects else self._pope_objects(sample)

        def presence_query(name: str) -> Query:
            # Nearly every answer is one of these: verifying both is cheaper than generating.
            return self._query(drafts, sample, presence(name), ["Yes", "No"])

        return _SampleQueries(
            sample=sample,
            caption=self._query(drafts, sample, None, [sample.caption]),
            questions=tuple(self._query(drafts, sample, question, [answer]) for question, answer in questions),
            present={name: presence_query(name) for name in present},
            absent={way: {name: presence_query(name) for name in names} for way, names in absent.items() if names},
        )

    def _pope_objects(self, sample: Sample) -> tuple[list[str], dict[str, list[str]]]:
        """Return the objects that POPE asks about: present ones, and absent ones by strategy."""
        settings, seed = self.settings, f"{self.settings.seed} {sample.sample_id}"
        objects = tuple(dict.fromkeys(name.casefold() for name in sample.objects or ()))
        return choose_pope_objects(
            self.statistics, objects, settings.pope_objects, seed, settings.pope_positives, settings.pope_adversarial
        )

    def _is_affected(self, sample: Sample, answer: str) -> bool:
        return bool(self.requests.unwanted(objects_of(sample)) & self.lexicon.named(answer, sample.language))

    def _scoped(self, common: _SampleQueries, drafts: Drafts) -> _ScopedQueries:
        """Return what the edit should do at a sample, and the further queries for that."""
        sample = common.sample
        # Only looked up: `_measured` has already asked all common queries together.
        (caption,) = self.baseline.replies([common.caption], [drafts[common.caption.key]])
        scope = scope_of(self.requests, self.lexicon, sample, caption.text)
        others = paraphrases(sample.language) if scope.requests and self.reads_images else ()
        variants = VARIANTS if scope.requests and sample.image is not None else ()
        return _ScopedQueries(
            common=common,
            scope=scope,
            paraphrases=tuple(self._query(drafts, sample, other, [caption.text]) for other in others),
            variants=tuple(self._query(drafts, sample, None, [caption.text], variant) for variant in variants),
        )

    def _add_effects(self, rows: MeasurementBuffer, scoped: _ScopedQueries, found: Mapping[Key, Change]) -> None:
        """Add what the edit did to the texts about one sample."""
        sample, scope, change = scoped.common.sample, scoped.scope, found[scoped.common.caption.key]
        several = len(self.requests.requests) > 1
        caption_effects(rows, self.lexicon, sample, scope, change, several=several)
        answers = [found[query.key] for query in scoped.common.questions]
        if scope.role == UNRELATED:
            # POPE's where the data has no questions, so that data with objects alone is measured too.
            asked = answers or [found[query.key] for query in scoped.common.pope.values()]
            locality(rows, "image_locality_questions", sample.sample_id, asked)
        tried: list[tuple[tuple[str, ...], Change]] = [(QUESTIONS, answer) for answer in answers]
        tried += [(PROMPTS, found[query.key]) for query in scoped.paraphrases]
        tried += [((VARIANTS[query.variant],), found[query.key]) for query in scoped.variants]
        for measures, reply in tried:
            generality(rows, measures, self.requests, self.lexicon, sample, reply)
        rows.captions.append(caption_row(sample, change, scope.role))

    def _add_quality(self, rows: MeasurementBuffer, common: _SampleQueries, found: Mapping[Key, TextChange]) -> None:
        """Add hallucination and caption quality of one sample, whatever the edit is about."""
        sample, change, objects = common.sample, found[common.caption.key], objects_of(common.sample)
        name, language = sample.sample_id, sample.language
        named = self.lexicon.named(change.before, language), self.lexicon.named(change.after, language)
        if objects is not None:
            chair(rows, self.chair_lexicon, name, objects, language, change.before, change.after)
            hallucinated(rows, self.requests.pairs, name, objects, *named)
        image = self.baseline.image(sample)
        if self.detector is not None and image is not None:
            confirmed(rows, name, self.detector.confidence(image, named[0] | named[1]), *named)
        # With released questions, the drawn ones are only about what an edit leaves alone.
        if common.present and not self.settings.pope:
            absent = {way: list(names) for way, names in common.absent.items()}
            changes = {name: found[query.key] for name, query in common.pope.items()}
            pope(rows, name, list(common.present), absent, changes, self.settings.pope_parser)
        if self.bleu and sample.caption:
            before, after = (bleu_sums(text, sample.caption, language) for text in (change.before, change.after))
            rows.add("bleu", name, before, after)

    def _add_similarity(
        self, rows: MeasurementBuffer, common: Sequence[_SampleQueries], found: Mapping[Key, TextChange]
    ) -> None:
        """Add the similarity of captions to the data's, by greedy token matching as in BERTScore."""
        if self.encoder is None:
            return
        pairs = [(one.sample, found[one.caption.key]) for one in common if one.sample.caption]
        # All texts first, in batches; `match` then looks up their vectors.
        self.encoder.vectors([text for sample, pair in pairs for text in (sample.caption, pair.before, pair.after)])
        for sample, pair in pairs:
            before, after = (self.encoder.match(text, sample.caption) for text in (pair.before, pair.after))
            rows.share("bertscore", sample.sample_id, before, after)

    def _add_teacher_forced(
        self, rows: MeasurementBuffer, scoped: Sequence[_ScopedQueries], found: Mapping[Key, Change]
    ) -> None:
        """Add, per token, whether the edited model predicts the captions that a swap should lead to."""
        expected: list[tuple[_ScopedQueries, Query, list[int]]] = []
        for one in scoped:
            query, language = one.common.caption, one.common.sample.language
            text = expected_caption(one.scope.requests, self.lexicon, found[query.key].before, language)
            if text is not None:
                expected.append((one, query, self.baseline.tokens(query, text)))
        verifier = self.baseline.verifier
        predictions = forced_predictions(
            verifier, self.edit, [query for _, query, _ in expected], [tokens for *_, tokens in expected]
        )
        for (one, query, tokens), likeliest in zip(expected, predictions, strict=True):
            before, after = (verifier.ended(row) for row in likeliest)
            # A caption that was cut off has no end, so its rewritten form is not expected to end either.
            target = tokens if self.baseline.cut_off(query) else [*tokens, verifier.end]
            name, length = query.sample_id, len(target)
            teacher_forced_effects(rows, one.scope, name, target, before[:length], after[:length])


def caption_row(sample: Sample, change: TextChange, role: str) -> dict[str, object]:
    """Return a row of the captions before and after."""
    return {
        "sample_id": sample.sample_id,
        "before": change.before,
        "after": change.after,
        "changed": not change.same,
        "role": role,
        "image": sample.image_key,
    }


def _failure(sample: Sample, stage: str, reason: str) -> Failure:
    return Failure(sample.sample_id, sample.source, stage, " ".join(reason.split())[:500])
