"""Measure an edit on the records of MMEdit's E-VQA and E-IC (Cheng et al. 2023), read from the published files.

A record says what the edited model should answer: `alt` to the prompt `src` about `image`, to its `rephrase`, and about
`image_rephrase`. It also says what should stay: the replies to the text question `loc`, and to the question `m_loc_q`
about the image `m_loc`.

Beyond MMEdit: records of VLKEB (Huang et al. 2024) have a question in `port_new` whose answer follows from the edit.
The same prompt about another image, or none, and another question about the edited image should stay (De-VQA, Han et
al. 2025).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmray.data.images import LARGEST_FILE, decode_image
from mmray.errors import InputError
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.comparing import compare, forced_predictions, rank_agreements
from mmray.features.evaluation.draft_verifier import without_failures
from mmray.features.evaluation.effects import locality
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Edit, Query
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.storage import LocalStore, S3Store, open_object, open_store

NAME = "mmedit: "
"""Prefix of a record's number in `sample_id`."""
NEEDED = ("src", "alt", "image")
LOCALITY_PROMPT = "Question: {} Short answer:"
"""How MMEdit asks about the image that should be left alone."""
PORTABILITY = ("portability_prompt", "portability_answer")
"""Fields that the first question of `port_new` is read into."""
REWRITES = {
    "mmedit_reliability": ("src", "image", "alt"),
    "mmedit_text_generality": ("rephrase", "image", "alt"),
    "mmedit_image_generality": ("src", "image_rephrase", "alt"),
    "mmedit_portability": (PORTABILITY[0], "image", PORTABILITY[1]),
}
"""Measure → the record's fields of the prompt, the image, and the answer that they should lead to."""
UNCHANGED = {
    "mmedit_text_locality": ("loc", "", "loc_ans"),
    "mmedit_image_locality": ("m_loc_q", "m_loc", "m_loc_a"),
    "mmedit_random_image_locality": ("src", "m_loc", ""),
    "mmedit_no_image_locality": ("src", "", ""),
    "mmedit_consistent_image_locality": ("m_loc_q", "image", ""),
}
"""Measure → the record's fields of the prompt, the image and the expected answer that should stay."""
IMAGES = ("image", "image_rephrase", "m_loc")
"""A record's fields that name images."""


@dataclass(frozen=True)
class Records:
    """Records with their numbers in the file, and the folder of their images."""

    folder: str
    records: tuple[tuple[int, dict[str, Any]], ...]
    skipped: int
    """Records without an `alt`, which MMEdit leaves out too."""


def read_records(uri: str, images: str | None) -> Records:
    """Return the records of a file; raises InputError if it has none, or one lacks a field that every record needs."""
    store, name = open_object(uri)
    form = "give a JSON list of MMEdit's records (src, alt, image, …)"
    try:
        content = json.loads(store.read(name))
    except FileNotFoundError:
        raise InputError(f"--mmedit {uri}: no such file; {form}") from None
    except ValueError as error:
        raise InputError(f"--mmedit {uri}: not JSON ({error}); {form}") from error
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(f"--mmedit {uri}: not a list of objects; {form}")
    for number, record in enumerate(content):
        if missing := [field for field in NEEDED if not isinstance(record.get(field), str)]:
            raise InputError(f"--mmedit {uri}: record {number} has no {missing[0]!r}; {form}")
    kept = tuple((number, _flat(record)) for number, record in enumerate(content) if record["alt"].strip())
    if not kept:
        raise InputError(f"--mmedit {uri}: no record with an 'alt'; {form}")
    return Records(images or store.uri, kept, len(content) - len(kept))


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the first question of `port_new` as fields of its own."""
    first = (record.get("port_new") or [{}])[0].get("Q&A") or {}
    if not first.get("Answer"):
        return record
    return record | dict(zip(PORTABILITY, (first.get("Question"), first["Answer"]), strict=True))


def measure_records(baseline: BaselineReplies, edit: Edit, records: Records) -> MeasurementBuffer:
    """Return the measurements of records; one with an unusable image or prompt is a row in `errors`."""
    rows = MeasurementBuffer()
    store = open_store(records.folder)
    for part in within_budget(records.records, lambda pair: _pixels(baseline, store, pair[1]), BUDGET):
        rows.extend(_measured(baseline, edit, replace(records, records=tuple(part))))
    return rows


def _pixels(baseline: BaselineReplies, store: LocalStore | S3Store, record: dict[str, Any]) -> int:
    """Return the pixels of a record's images."""
    # Decoded images count against the budget once, whichever fields name them.
    names = {str(record[image]) for image in IMAGES if record.get(image)}
    return sum(pixels_of(baseline.model, _encoded(store, name)) for name in names)


def _encoded(store: LocalStore | S3Store, name: str) -> bytes | None:
    try:
        return store.read_at_most(name, LARGEST_FILE)
    except (OSError, ValueError):
        return None  # reported when the image is decoded


def _measured(baseline: BaselineReplies, edit: Edit, records: Records) -> MeasurementBuffer:
    """Return the measurements of records whose decoded images fit in the budget together."""
    # By number, because a query that fails drops its record.
    kept = dict(records.records)
    failures: list[dict[str, object]] = []

    def drop(query: Query, reason: str) -> None:
        kept.pop(int(query.sample_id.removeprefix(NAME)))
        failures.append({"sample_id": query.sample_id, "source": query.variant, "stage": "forward", "message": reason})

    def measured() -> MeasurementBuffer:
        # New in each attempt: what an attempt measured before it failed must not count twice.
        rows = MeasurementBuffer()
        make = _QueryMaker(baseline, records.folder, rows)
        changed, unchanged = [], []
        for number, record in kept.items():
            for measure, (prompt, image, answer) in REWRITES.items():
                if query := make.query(number, record, prompt, image):
                    changed.append((measure, query, record[answer].strip()))
            for measure, (prompt, image, answer) in UNCHANGED.items():
                if query := make.query(number, record, prompt, image):
                    unchanged.append((measure, query, str(record.get(answer) or "").strip()))
        _rewrites(rows, baseline, edit, changed)
        _locality(rows, baseline, edit, unchanged)
        return rows

    rows = without_failures(measured, drop)
    rows.errors.extend(failures)
    return rows


class _QueryMaker:
    """Makes the queries of records; each image is read once."""

    def __init__(self, baseline: BaselineReplies, folder: str, rows: MeasurementBuffer) -> None:
        self.baseline = baseline
        self.store = open_store(folder)
        self.rows = rows
        self.images: dict[str, Any] = {}

    def query(self, number: int, record: dict[str, Any], prompt: str, image: str) -> Query | None:
        """Return the query of a record's fields; None if it lacks one, or its image can't be read."""
        question, name = record.get(prompt), record.get(image) if image else None
        if not question or (image and not name):
            return None
        if name is not None and name not in self.images:
            self.images[name] = self._read(number, str(name))
        picture = self.images[name] if name is not None else None
        if image and picture is None:
            return None
        asked = LOCALITY_PROMPT.format(question) if prompt == "m_loc_q" else question
        text = prompt_text(self.baseline.model, asked, "en", image=picture is not None)
        return Query(f"{NAME}{number}", text, picture, str(name or ""), all_positions=True)

    def _read(self, number: int, name: str) -> Any:
        try:
            return decode_image(self.store.read_at_most(name, LARGEST_FILE))
        except (OSError, ValueError) as error:
            reason = "no such image" if isinstance(error, FileNotFoundError) else str(error)
            failure: dict[str, object] = {"sample_id": f"{NAME}{number}", "source": name, "stage": "read"}
            self.rows.errors.append(failure | {"message": reason})
            return None


def _rewrites(
    rows: MeasurementBuffer, baseline: BaselineReplies, edit: Edit, items: Sequence[tuple[str, Query, str]]
) -> None:
    """Add, by each protocol, whether the model answers as the record requests."""
    queries, alts = [query for _, query, _ in items], [alt for *_, alt in items]
    targets = [baseline.tokens(query, alt) for query, alt in zip(queries, alts, strict=True)]
    changes = compare(baseline.verifier, edit, queries, baseline.replies(queries, [[alt] for alt in alts]))
    predictions = forced_predictions(baseline.verifier, edit, queries, targets)
    for (measure, query, alt), target, change, likeliest in zip(items, targets, changes, predictions, strict=True):
        # MMEdit compares the target's tokens, but not the end after them.
        right = [[one == other for one, other in zip(target, found, strict=False)] for found in likeliest]
        rows.share(measure, query.sample_id, _same(change.before, alt), _same(change.after, alt))
        rows.share(f"{measure}_exact", query.sample_id, all(right[0]), all(right[1]))
        # A share per record: MMEdit averages over records, however long their targets are.
        rows.share(f"{measure}_token", query.sample_id, sum(right[0]) / len(target), sum(right[1]) / len(target))


def _locality(
    rows: MeasurementBuffer, baseline: BaselineReplies, edit: Edit, items: Sequence[tuple[str, Query, str]]
) -> None:
    """Add how far replies that should stay do: along the model's own reply, and as MMEdit does along the answer."""
    queries, answers = [query for _, query, _ in items], [answer for *_, answer in items]
    changes = compare(baseline.verifier, edit, queries, baseline.replies(queries, [[answer] for answer in answers]))
    along = [baseline.tokens(query, answer) if answer else [] for query, answer in zip(queries, answers, strict=True)]
    legacy = rank_agreements(baseline.verifier, edit, queries, along)
    for (measure, query, _), change, (top10, top1) in zip(items, changes, legacy, strict=True):
        locality(rows, measure, query.sample_id, [replace(change, top10=top10, top1=top1)])


def _same(reply: str, alt: str) -> bool:
    """Return whether two answers are equal, ignoring case, blanks at the ends and a full stop."""
    return reply.strip().rstrip(".").casefold() == alt.strip().rstrip(".").casefold()
