"""Ask the samples of one unit of work before and after an edit, and add up what that shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmray.datasets.samples import Failure, Sample
from mmray.evaluation.asks import Ask, Change, Edit
from mmray.evaluation.before import CROPS, FLIP, Before
from mmray.evaluation.comparing import compare, forced
from mmray.evaluation.effects import caption_effects, forced_effects, generality, locality, rewritten
from mmray.evaluation.facts import DataFacts
from mmray.evaluation.hallucination import asked_objects, chair, hallucinated, pope
from mmray.evaluation.mmedit import Records, measure_records
from mmray.evaluation.naming import Naming, read_synonyms
from mmray.evaluation.prompts import TextQuestion, paraphrases, presence
from mmray.evaluation.quality import Encoder, bleu, has_bleu, similarity
from mmray.evaluation.questioner import surviving
from mmray.evaluation.rows import Rows
from mmray.evaluation.scope import UNRELATED, Scope, aim_of, objects_of, scope_of
from mmray.evaluation.settings import MeasureSettings
from mmray.models.prompting import prompt_text

VARIANTS = {FLIP: "image_generality_flip"} | dict.fromkeys(CROPS, "image_generality_crop")
"""What is done to an image → the measure that it counts for."""


@dataclass(frozen=True)
class _Subject:
    """A sample with what was asked about it; each ask may serve more than one measure."""

    sample: Sample
    scope: Scope
    caption: Ask
    questions: tuple[Ask, ...]
    present: dict[str, Ask]
    absent: dict[str, dict[str, Ask]]
    paraphrases: tuple[Ask, ...]
    variants: tuple[Ask, ...]

    def asks(self) -> Iterator[Ask]:
        """Yield all asks, some perhaps twice."""
        yield from (self.caption, *self.questions, *self.present.values(), *self.paraphrases, *self.variants)
        for asks in self.absent.values():
            yield from asks.values()


class Measuring:
    """One edit against one model's replies before it."""

    def __init__(self, before: Before, edit: Edit, facts: DataFacts, settings: MeasureSettings) -> None:
        self.before = before
        self.edit = edit
        self.facts = facts
        self.settings = settings
        synonyms = read_synonyms(settings.synonyms) if settings.synonyms else {}
        known = Naming(facts.vocabulary, facts.translations, synonyms)
        self.aim = aim_of(edit.purpose, known)
        self.naming = Naming((*facts.vocabulary, *sorted(self.aim.words)), facts.translations, synonyms)
        self.bleu = has_bleu(settings.bleu)
        self.encoder = Encoder(settings.encoder, before.model.device) if settings.encoder else None

    def samples(self, samples: Sequence[Sample | Failure], *, own: bool = False) -> Rows:
        """Return the rows of samples; `own`: they are not of the data, but what the edit was made on."""
        failures = [sample for sample in samples if isinstance(sample, Failure)]
        readable = [sample for sample in samples if isinstance(sample, Sample)]
        for sample in readable:
            try:
                self.before.image(sample)
            except ValueError as error:
                failures.append(_failure(sample, "decode", f"image can't be read: {error}"))
        lost = {failure.sample_id for failure in failures}
        kept = {sample.sample_id: sample for sample in readable if sample.sample_id not in lost}

        def drop(ask: Ask, reason: str) -> None:
            failures.append(_failure(kept.pop(ask.sample_id), "forward", reason))

        rows = surviving(lambda: self._measured(list(kept.values()), own), drop)
        rows.errors = [vars(failure) for failure in sorted(failures, key=lambda f: (f.source, f.sample_id, f.stage))]
        return rows

    def texts(self, questions: Sequence[TextQuestion]) -> Rows:
        """Return the rows of questions without an image."""
        model = self.before.model
        kept = {f"text: {question.name}": question for question in questions}
        lost: list[Failure] = []

        def drop(ask: Ask, reason: str) -> None:
            kept.pop(ask.sample_id)
            lost.append(Failure(ask.sample_id, "text questions", "forward", reason))

        def measured() -> Rows:
            rows = Rows()
            prompts = [prompt_text(model, question.question, "en", image=False) for question in kept.values()]
            asks = [Ask(name, prompt, None, whole=True) for name, prompt in zip(kept, prompts, strict=True)]
            replies = self.before.replies(asks, [question.draft for question in kept.values()])
            changes = compare(self.before.questioner, self.edit, asks, replies)
            for (name, question), change in zip(kept.items(), changes, strict=True):
                locality(rows, "text_locality_about" if question.about else "text_locality", name, [change])
            return rows

        rows = surviving(measured, drop)
        rows.errors = [vars(failure) for failure in lost]
        return rows

    def records(self, records: Records) -> Rows:
        """Return the rows of MMEdit's records."""
        return measure_records(self.before, self.edit, records)

    def _measured(self, samples: Sequence[Sample], own: bool) -> Rows:
        captions = [self.before.ask(sample, whole=True) for sample in samples]
        written = self.before.replies(captions, [sample.caption for sample in samples])
        drafts: dict[tuple[str, str, str], str] = {}
        subjects = []
        for sample, ask, reply in zip(samples, captions, written, strict=True):
            scope = scope_of(self.aim, self.naming, sample, reply.text)
            subjects.append(self._subject(sample, scope, ask, reply.text, own, drafts))
        asks = list({ask.key: ask for subject in subjects for ask in subject.asks()}.values())
        replies = self.before.replies(asks, [drafts.get(ask.key, "") for ask in asks])
        changes = compare(self.before.questioner, self.edit, asks, replies)
        found = {ask.key: change for ask, change in zip(asks, changes, strict=True)}
        rows = Rows()
        for subject in subjects:
            self._effects(rows, subject, found)
            if not own:
                self._whole(rows, subject, found)
        self._forced(rows, subjects, found)
        if self.encoder is not None and not own:
            texts = [(s.sample.sample_id, s.sample.caption, found[s.caption.key]) for s in subjects]
            given = [(name, caption, change.before, change.after) for name, caption, change in texts if caption]
            similarity(rows, self.encoder, given)
        return rows

    def _subject(
        self, sample: Sample, scope: Scope, caption: Ask, text: str, own: bool, drafts: dict[tuple[str, str, str], str]
    ) -> _Subject:
        """Return what to ask about a sample; guesses of the answers are put into `drafts`."""

        def ask(question: str | None, draft: str, variant: str = "") -> Ask:
            made = self.before.ask(sample, question, variant)
            drafts.setdefault(made.key, draft)
            return made

        # Elsewhere than on unrelated images only those questions matter whose answer may name the word.
        questions = [
            ask(question, answer)
            for question, answer in sample.questions or ()
            if (scope.role == UNRELATED and not own) or scope.gone & self.naming.named(answer, sample.language)
        ]
        objects = None if own or not self.settings.pope_objects else objects_of(sample)
        present, absent = (
            asked_objects(self.facts, objects, self.settings.pope_objects, f"{self.settings.seed} {sample.sample_id}")
            if objects
            else ([], {})
        )
        others = paraphrases(sample.language) if scope.in_scope else ()
        variants = VARIANTS if scope.in_scope and sample.image is not None else ()
        return _Subject(
            sample=sample,
            scope=scope,
            caption=caption,
            questions=tuple(questions),
            present={name: ask(presence(name), "Yes") for name in present},
            absent={way: {name: ask(presence(name), "No") for name in names} for way, names in absent.items()},
            paraphrases=tuple(ask(prompt, text) for prompt in others),
            variants=tuple(ask(None, text, variant) for variant in variants),
        )

    def _effects(self, rows: Rows, subject: _Subject, found: dict[tuple[str, str, str], Change]) -> None:
        """Add what the edit did to one sample's texts."""
        sample, scope, change = subject.sample, subject.scope, found[subject.caption.key]
        caption_effects(rows, self.aim, self.naming, sample, scope, change)
        answers = [found[ask.key] for ask in subject.questions]
        if scope.role == UNRELATED:
            locality(rows, "image_locality_questions", sample.sample_id, answers)
        tried = [(("text_generality", "text_generality_questions"), answer) for answer in answers]
        tried += [(("text_generality", "text_generality_prompts"), found[ask.key]) for ask in subject.paraphrases]
        tried += [((VARIANTS[ask.variant],), found[ask.key]) for ask in subject.variants]
        for measures, reply in tried:
            generality(rows, measures, self.aim, self.naming, sample, scope.gone, reply)
        rows.captions.append(
            {
                "sample_id": sample.sample_id,
                "before": change.before,
                "after": change.after,
                "changed": not change.same,
                "role": scope.role,
            }
        )

    def _whole(self, rows: Rows, subject: _Subject, found: dict[tuple[str, str, str], Change]) -> None:
        """Add what one sample of the data shows whatever the edit is about: hallucination and caption quality."""
        sample, change, objects = subject.sample, found[subject.caption.key], objects_of(subject.sample)
        name, language = sample.sample_id, sample.language
        if objects is not None:
            chair(rows, self.naming, name, objects, language, change.before, change.after)
            named = self.naming.named(change.before, language), self.naming.named(change.after, language)
            hallucinated(rows, self.aim.pairs, name, objects, *named)
        if subject.present:
            asks = subject.present | {name: ask for asks in subject.absent.values() for name, ask in asks.items()}
            pope(rows, name, list(subject.present), subject.absent, {thing: found[a.key] for thing, a in asks.items()})
        if self.bleu and sample.caption:
            bleu(rows, name, sample.caption, language, change.before, change.after)

    def _forced(self, rows: Rows, subjects: Sequence[_Subject], found: dict[tuple[str, str, str], Change]) -> None:
        """Add how likely the edited model finds the captions that a swap should lead to."""
        asks, tokens, scoped = [], [], []
        for subject in subjects:
            caption, language = found[subject.caption.key].before, subject.sample.language
            wanted = rewritten(self.aim, self.naming, caption, language) if subject.scope.in_scope else None
            if wanted is not None:
                asks.append(subject.caption)
                tokens.append(self.before.tokens(subject.caption, wanted))
                scoped.append(subject)
        if not asks:
            return
        questioner = self.before.questioner
        said = forced(questioner, self.edit, asks, tokens)
        for subject, given, likeliest in zip(scoped, tokens, said, strict=True):
            before, after = (questioner.ended(tokens) for tokens in likeliest)
            forced_effects(rows, subject.scope, subject.sample.sample_id, [*given, questioner.end], before, after)


def _failure(sample: Sample, stage: str, reason: str) -> Failure:
    return Failure(sample.sample_id, sample.source, stage, " ".join(reason.split())[:500])

