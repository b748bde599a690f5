"""Ask the samples of one unit of work before and after an edit, and add up what that shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mmray.data.samples import Failure, Sample
from mmray.features.evaluation.baseline_replies import CROPS, FLIP, BaselineReplies
from mmray.features.evaluation.chair import chair, confirmed, hallucinated, pope
from mmray.features.evaluation.comparing import compare, forced
from mmray.features.evaluation.draft_verifier import surviving
from mmray.features.evaluation.edit_targets import UNRELATED, TargetsOfSample, aim_of, scope_of
from mmray.features.evaluation.effects import caption_effects, forced_effects, generality, locality, rewritten
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.mmedit import Records, measure_records
from mmray.features.evaluation.quality import bleu, has_bleu, similarity
from mmray.features.evaluation.queries import Change, Edit, Query, Reply
from mmray.features.evaluation.settings import MeasureSettings
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.objects.ground_truth import with_ground_truth
from mmray.objects.lexicon import object_lexicon, objects_of
from mmray.objects.prompts import TextQuestion, paraphrases, presence
from mmray.objects.statistics import ObjectStatistics, choose_pope_objects
from mmray.objects.words import open_words

QUESTIONS = ("text_generality", "text_generality_questions")
PROMPTS = ("text_generality", "text_generality_prompts")
VARIANTS = {FLIP: "image_generality_flip"} | dict.fromkeys(CROPS, "image_generality_crop")
"""What is done to an image → the measure that it counts for."""


Drafts: TypeAlias = dict[tuple[str, str, str], list[str]]
"""Key of an ask → guesses of its answer."""


@dataclass(frozen=True)
class _Asked:
    """What is asked about a sample whatever the edit is about; the questions are in the order of the sample's."""

    sample: Sample
    caption: Query
    questions: tuple[Query, ...]
    present: dict[str, Query]
    absent: dict[str, dict[str, Query]]

    def asks(self) -> Iterator[Query]:
        """Yield all asks, some perhaps twice."""
        yield from (self.caption, *self.questions, *self.present.values())
        for asks in self.absent.values():
            yield from asks.values()


@dataclass(frozen=True)
class _Scoped:
    """A sample with what the edit is to do there, and what is asked for that alone."""

    asked: _Asked
    scope: TargetsOfSample
    paraphrases: tuple[Query, ...]
    variants: tuple[Query, ...]


class EditEvaluator:
    """One edit against one model's replies before it."""

    def __init__(self, before: BaselineReplies, edit: Edit, facts: ObjectStatistics, settings: MeasureSettings) -> None:
        self.before = before
        self.edit = edit
        self.facts = facts
        self.settings = settings
        words = open_words(settings.synonyms, facts.vocabulary)
        known = object_lexicon(facts.vocabulary, facts.translations, words)
        self.aim = aim_of(edit.purposes, known)
        aimed = sorted(self.aim.words)
        self.naming = object_lexicon((*facts.vocabulary, *aimed), facts.translations, words)
        # In CHAIR a synonym stays one (man: person), even where the edit is about that word.
        new = [word for word in aimed if not known.named(word, None)]
        self.objects = object_lexicon((*facts.vocabulary, *new), facts.translations, words)
        self.bleu = has_bleu(settings.bleu)
        self.detector = before.opinion(settings.detector) if settings.detector else None
        self.encoder = before.encoder(settings.encoder) if settings.encoder else None

    def samples(self, samples: Sequence[Sample | Failure], *, own: bool = False) -> MeasurementBuffer:
        """Return the rows of samples; `own`: they are not of the data, but what the edit was made on."""
        truth, known = self.settings.ground_truth or "instances", self.facts.references
        readable = (
            with_ground_truth(sample, truth, self.objects, known) for sample in samples if isinstance(sample, Sample)
        )
        rows = MeasurementBuffer(errors=[vars(sample) for sample in samples if isinstance(sample, Failure)])
        parts = list(within_budget(readable, lambda sample: pixels_of(self.before.model, sample.image), BUDGET))
        for part in parts:
            rows.extend(self._readable(part, own))
            if len(parts) > 1:
                self.before.forget_images()
        rows.errors.sort(key=lambda row: (row["source"], row["sample_id"], row["stage"]))
        return rows

    def _readable(self, readable: Sequence[Sample], own: bool) -> MeasurementBuffer:
        """Return the rows of samples whose images can be held decoded together."""
        failures: list[Failure] = []
        for sample in readable:
            try:
                self.before.image(sample)
            except ValueError as error:
                failures.append(_failure(sample, "decode", f"image can't be read: {error}"))
        lost = {failure.sample_id for failure in failures}
        kept = {sample.sample_id: sample for sample in readable if sample.sample_id not in lost}

        def drop(ask: Query, reason: str) -> None:
            failures.append(_failure(kept.pop(ask.sample_id), "forward", reason))

        rows = surviving(lambda: self._measured(list(kept.values()), own), drop)
        rows.errors = [vars(failure) for failure in failures]
        return rows

    def texts(self, questions: Sequence[TextQuestion]) -> MeasurementBuffer:
        """Return the rows of questions without an image."""
        model = self.before.model
        kept = {f"text: {question.name}": question for question in questions}
        lost: list[Failure] = []

        def drop(ask: Query, reason: str) -> None:
            kept.pop(ask.sample_id)
            lost.append(Failure(ask.sample_id, "text questions", "forward", reason))

        def measured() -> MeasurementBuffer:
            rows = MeasurementBuffer()
            prompts = [prompt_text(model, question.question, "en", image=False) for question in kept.values()]
            asks = [Query(name, prompt, None, whole=True) for name, prompt in zip(kept, prompts, strict=True)]
            replies = self.before.replies(asks, [[question.draft] for question in kept.values()])
            changes = compare(self.before.questioner, self.edit, asks, replies)
            for (name, question), change in zip(kept.items(), changes, strict=True):
                locality(rows, "text_locality_about" if question.about else "text_locality", name, [change])
            return rows

        rows = surviving(measured, drop)
        rows.errors = [vars(failure) for failure in lost]
        return rows

    def records(self, records: Records) -> MeasurementBuffer:
        """Return the rows of MMEdit's records."""
        return measure_records(self.before, self.edit, records)

    def _measured(self, samples: Sequence[Sample], own: bool) -> MeasurementBuffer:
        drafts: Drafts = {}
        asked = [self._asked(sample, own, drafts) for sample in samples]
        self._answer([ask for one in asked for ask in one.asks()], drafts)
        scoped = [self._scoped(one, drafts) for one in asked]
        asks = [ask for one in scoped for ask in (*one.asked.asks(), *one.paraphrases, *one.variants)]
        replies = self._answer(asks, drafts)
        changes = compare(self.before.questioner, self.edit, [ask for ask, _ in replies], [r for _, r in replies])
        found = {ask.key: change for (ask, _), change in zip(replies, changes, strict=True)}
        rows = MeasurementBuffer(images={sample.sample_id: sample.image_key for sample in samples})
        for one in scoped:
            self._effects(rows, one, found)
            if not own:
                self._whole(rows, one.asked, found)
        self._forced(rows, scoped, found)
        if self.encoder is not None and not own:
            texts = [(one.sample, found[one.caption.key]) for one in asked if one.sample.caption]
            similarity(rows, self.encoder, [(s.sample_id, s.caption, c.before, c.after) for s, c in texts])
        return rows

    def _answer(self, asks: Sequence[Query], drafts: Drafts) -> list[tuple[Query, Reply]]:
        """Return each ask once, with the reply before the edit."""
        once = list({ask.key: ask for ask in asks}.values())
        return list(zip(once, self.before.replies(once, [drafts[ask.key] for ask in once]), strict=True))

    def _ask(
        self, drafts: Drafts, sample: Sample, question: str | None, guesses: list[str], variant: str = ""
    ) -> Query:
        made = self.before.ask(sample, question, variant, whole=question is None and not variant)
        drafts.setdefault(made.key, guesses)
        return made

    def _asked(self, sample: Sample, own: bool, drafts: Drafts) -> _Asked:
        """Return what to ask about a sample; of what the edit was made on, that which shows its effect."""
        pairs = sample.questions or ()
        questions = [pair for pair in pairs if not own or self._about(sample, pair[1])]
        present, absent = ([], {}) if own or not self.settings.pope_objects else self._pope_objects(sample)

        def there(name: str) -> Query:
            return self._ask(drafts, sample, presence(name), ["Yes", "No"])

        return _Asked(
            sample=sample,
            caption=self._ask(drafts, sample, None, [sample.caption]),
            questions=tuple(self._ask(drafts, sample, asked, [answer]) for asked, answer in questions),
            present={name: there(name) for name in present},
            absent={way: {name: there(name) for name in names} for way, names in absent.items() if names},
        )

    def _pope_objects(self, sample: Sample) -> tuple[list[str], dict[str, list[str]]]:
        """Return the objects that POPE asks a sample for: present, and absent by strategy."""
        settings, seed = self.settings, f"{self.settings.seed} {sample.sample_id}"
        objects = tuple(dict.fromkeys(name.casefold() for name in sample.objects or ()))
        return choose_pope_objects(
            self.facts, objects, settings.pope_objects, seed, settings.pope_positives, settings.pope_adversarial
        )

    def _about(self, sample: Sample, answer: str) -> bool:
        return bool(self.aim.gone(objects_of(sample)) & self.naming.named(answer, sample.language))

    def _scoped(self, asked: _Asked, drafts: Drafts) -> _Scoped:
        """Return what the edit is to do at a sample, and what else to ask there."""
        sample = asked.sample
        (caption,) = self.before.replies([asked.caption], [drafts[asked.caption.key]])
        scope = scope_of(self.aim, self.naming, sample, caption.text)
        others = paraphrases(sample.language) if scope.wishes else ()
        variants = VARIANTS if scope.wishes and sample.image is not None else ()
        return _Scoped(
            asked=asked,
            scope=scope,
            paraphrases=tuple(self._ask(drafts, sample, prompt, [caption.text]) for prompt in others),
            variants=tuple(self._ask(drafts, sample, None, [caption.text], variant) for variant in variants),
        )

    def _effects(self, rows: MeasurementBuffer, scoped: _Scoped, found: dict[tuple[str, str, str], Change]) -> None:
        """Add what the edit did to one sample's texts."""
        sample, scope, change = scoped.asked.sample, scoped.scope, found[scoped.asked.caption.key]
        several = len(self.aim.wishes) > 1
        caption_effects(rows, self.naming, sample, scope, change, several=several)
        answers = [found[ask.key] for ask in scoped.asked.questions]
        if scope.role == UNRELATED:
            locality(rows, "image_locality_questions", sample.sample_id, answers)
        tried: list[tuple[tuple[str, ...], Change]] = [(QUESTIONS, answer) for answer in answers]
        tried += [(PROMPTS, found[ask.key]) for ask in scoped.paraphrases]
        tried += [((VARIANTS[ask.variant],), found[ask.key]) for ask in scoped.variants]
        for measures, reply in tried:
            generality(rows, measures, self.aim, self.naming, sample, reply)
        rows.captions.append(
            {
                "sample_id": sample.sample_id,
                "before": change.before,
                "after": change.after,
                "changed": not change.same,
                "role": scope.role,
                "image": sample.image_key,
            }
        )

    def _whole(self, rows: MeasurementBuffer, asked: _Asked, found: dict[tuple[str, str, str], Change]) -> None:
        """Add what one sample of the data shows whatever the edit is about: hallucination and caption quality."""
        sample, change, objects = asked.sample, found[asked.caption.key], objects_of(asked.sample)
        name, language = sample.sample_id, sample.language
        if objects is not None:
            chair(rows, self.objects, name, objects, language, change.before, change.after)
            named = self.naming.named(change.before, language), self.naming.named(change.after, language)
            hallucinated(rows, self.aim.pairs, name, objects, *named)
        image = self.before.image(sample)
        if self.detector is not None and image is not None:
            named = self.naming.named(change.before, language), self.naming.named(change.after, language)
            confirmed(rows, name, self.detector.confidence(image, named[0] | named[1]), *named)
        if asked.present:
            asks = asked.present | {name: ask for asks in asked.absent.values() for name, ask in asks.items()}
            absent = {way: list(things) for way, things in asked.absent.items()}
            changes = {thing: found[ask.key] for thing, ask in asks.items()}
            pope(rows, name, list(asked.present), absent, changes, self.settings.pope_parser)
        if self.bleu and sample.caption:
            bleu(rows, name, sample.caption, language, change.before, change.after)

    def _forced(
        self, rows: MeasurementBuffer, scoped: Sequence[_Scoped], found: dict[tuple[str, str, str], Change]
    ) -> None:
        """Add how likely the edited model finds the captions that a swap should lead to."""
        wanted: list[tuple[_Scoped, Query, list[int]]] = []
        for one in scoped:
            ask, language = one.asked.caption, one.asked.sample.language
            text = rewritten(one.scope.wishes, self.naming, found[ask.key].before, language)
            if text is not None:
                wanted.append((one, ask, self.before.tokens(ask, text)))
        questioner = self.before.questioner
        said = forced(questioner, self.edit, [ask for _, ask, _ in wanted], [tokens for *_, tokens in wanted])
        for (one, ask, tokens), likeliest in zip(wanted, said, strict=True):
            before, after = (questioner.ended(found) for found in likeliest)
            whole = tokens if self.before.cut(ask) else [*tokens, questioner.end]
            forced_effects(rows, one.scope, ask.sample_id, whole, before[: len(whole)], after[: len(whole)])


def _failure(sample: Sample, stage: str, reason: str) -> Failure:
    return Failure(sample.sample_id, sample.source, stage, " ".join(reason.split())[:500])
