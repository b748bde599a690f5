"""The records of MMEdit's E-VQA and E-IC (Cheng et al. 2023), read as they are, and measured before and after an edit.

A record says what an edit should make the model answer: `alt` to the prompt `src` about `image`, to its `rephrase`,
and about `image_rephrase`; and what it should leave alone: the text question `loc` and the question `m_loc_q` about
the image `m_loc`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmray.data.images import LARGEST_FILE, decode_image
from mmray.errors import InputError
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.comparing import compare, forced, whole_ranks
from mmray.features.evaluation.draft_verifier import surviving
from mmray.features.evaluation.effects import locality
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Edit, Query
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.storage import LocalStore, S3Store, open_object, open_store

NAME = "mmedit: "
"""What stands before a record's number where its rows name it."""
NEEDED = ("src", "alt", "image")
WRAPPED = "Question: {} Short answer:"
"""How MMEdit asks the question about the image that should be left alone."""
REWRITES = {
    "mmedit_reliability": ("src", "image"),
    "mmedit_text_generality": ("rephrase", "image"),
    "mmedit_image_generality": ("src", "image_rephrase"),
}
"""Measure → the record's fields of the prompt and the image that should lead to `alt`."""
LEFT = {"mmedit_text_locality": ("loc", "", "loc_ans"), "mmedit_image_locality": ("m_loc_q", "m_loc", "m_loc_a")}
"""Measure → the record's fields of the prompt, the image and the expected answer that should stay."""
IMAGES = ("image", "image_rephrase", "m_loc")
"""A record's fields of images."""


@dataclass(frozen=True)
class Records:
    """Records with a number each, and the folder of their images."""

    folder: str
    records: tuple[tuple[int, dict[str, Any]], ...]
    skipped: int
    """Records without an `alt`, which MMEdit leaves out."""


def read_records(uri: str, images: str | None) -> Records:
    """Return the records of a file; raises InputError where there are none, or one lacks what every record has."""
    store, name = open_object(uri)
    form = "give a JSON list of MMEdit's records (src, alt, image, …)"
    try:
        content = json.loads(store.read(name))
    except FileNotFoundError:
        raise InputError(f"--mmedit {uri}: no such file") from None
    except ValueError as error:
        raise InputError(f"--mmedit {uri}: not JSON ({error}); {form}") from error
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(f"--mmedit {uri}: not a list of objects; {form}")
    for number, record in enumerate(content):
        if missing := [field for field in NEEDED if not isinstance(record.get(field), str)]:
            raise InputError(f"--mmedit {uri}: record {number} has no {missing[0]!r}; {form}")
    kept = tuple((number, record) for number, record in enumerate(content) if record["alt"].strip())
    if not kept:
        raise InputError(f"--mmedit {uri}: no record with an 'alt'; {form}")
    return Records(images or store.uri, kept, len(content) - len(kept))


def measure_records(before: BaselineReplies, edit: Edit, records: Records) -> MeasurementBuffer:
    """Return the rows of records; one whose image or prompt can't be had is a row in `errors`, the others count."""
    rows = MeasurementBuffer()
    store = open_store(records.folder)
    for part in within_budget(records.records, lambda pair: _pixels(before, store, pair[1]), BUDGET):
        rows.extend(_measured(before, edit, replace(records, records=tuple(part))))
    return rows


def _pixels(before: BaselineReplies, store: LocalStore | S3Store, record: dict[str, Any]) -> int:
    """Return the pixels of a record's images."""
    names = {str(record[image]) for image in IMAGES if record.get(image)}
    return sum(pixels_of(before.model, _encoded(store, name)) for name in names)


def _encoded(store: LocalStore | S3Store, name: str) -> bytes | None:
    try:
        return store.read_at_most(name, LARGEST_FILE)
    except (OSError, ValueError):
        return None  # The record's row in `errors` says why.


def _measured(before: BaselineReplies, edit: Edit, records: Records) -> MeasurementBuffer:
    """Return the rows of records whose images can be held decoded together."""
    kept = dict(records.records)
    lost: list[dict[str, object]] = []

    def drop(ask: Query, reason: str) -> None:
        kept.pop(int(ask.sample_id.removeprefix(NAME)))
        lost.append({"sample_id": ask.sample_id, "source": ask.variant, "stage": "forward", "message": reason})

    def measured() -> MeasurementBuffer:
        rows = MeasurementBuffer()
        made = _Made(before, records.folder, rows)
        changed, left = [], []
        for number, record in kept.items():
            for measure, (prompt, image) in REWRITES.items():
                if ask := made.ask(number, record, prompt, image):
                    changed.append((measure, ask, record["alt"].strip()))
            for measure, (prompt, image, answer) in LEFT.items():
                if ask := made.ask(number, record, prompt, image, WRAPPED if image else "{}"):
                    left.append((measure, ask, str(record.get(answer) or "").strip()))
        _rewrites(rows, before, edit, changed)
        _locality(rows, before, edit, left)
        return rows

    rows = surviving(measured, drop)
    rows.errors.extend(lost)
    return rows


class _Made:
    """Makes the asks of records, each image read once."""

    def __init__(self, before: BaselineReplies, folder: str, rows: MeasurementBuffer) -> None:
        self.before = before
        self.store = open_store(folder)
        self.rows = rows
        self.images: dict[str, Any] = {}

    def ask(self, number: int, record: dict[str, Any], prompt: str, image: str, wrapped: str = "{}") -> Query | None:
        """Return the ask of a record's field; None where it has no such field or its image can't be read."""
        question, name = record.get(prompt), record.get(image) if image else None
        if not question or (image and not name):
            return None
        if name is not None and name not in self.images:
            self.images[name] = self._read(number, str(name))
        picture = self.images[name] if name is not None else None
        if image and picture is None:
            return None
        text = prompt_text(self.before.model, wrapped.format(question), "en", image=picture is not None)
        return Query(f"{NAME}{number}", text, picture, str(name or ""), whole=True)

    def _read(self, number: int, name: str) -> Any:
        try:
            return decode_image(self.store.read_at_most(name, LARGEST_FILE))
        except (OSError, ValueError) as error:
            reason = "no such image" if isinstance(error, FileNotFoundError) else str(error)
            failure: dict[str, object] = {"sample_id": f"{NAME}{number}", "source": name, "stage": "read"}
            self.rows.errors.append(failure | {"message": reason})
            return None


def _rewrites(
    rows: MeasurementBuffer, before: BaselineReplies, edit: Edit, items: Sequence[tuple[str, Query, str]]
) -> None:
    """Add, by each protocol, whether the model answers what the record wants."""
    asks, wanted = [ask for _, ask, _ in items], [alt for *_, alt in items]
    targets = [before.tokens(ask, alt) for ask, alt in zip(asks, wanted, strict=True)]
    changes = compare(before.questioner, edit, asks, before.replies(asks, [[alt] for alt in wanted]))
    said = forced(before.questioner, edit, asks, targets)
    for (measure, ask, alt), target, change, likeliest in zip(items, targets, changes, said, strict=True):
        # MMEdit looks at the target's tokens, not at the end behind them.
        right = [[one == other for one, other in zip(target, found, strict=False)] for found in likeliest]
        rows.share(measure, ask.sample_id, _same(change.before, alt), _same(change.after, alt))
        rows.share(f"{measure}_exact", ask.sample_id, all(right[0]), all(right[1]))
        rows.share(f"{measure}_token", ask.sample_id, sum(right[0]) / len(target), sum(right[1]) / len(target))


def _locality(
    rows: MeasurementBuffer, before: BaselineReplies, edit: Edit, items: Sequence[tuple[str, Query, str]]
) -> None:
    """Add how far replies that should stay are as before: along the model's own, and MMEdit's way along the answer."""
    asks, answers = [ask for _, ask, _ in items], [answer for *_, answer in items]
    changes = compare(before.questioner, edit, asks, before.replies(asks, [[answer] for answer in answers]))
    along = [before.tokens(ask, answer) if answer else [] for ask, answer in zip(asks, answers, strict=True)]
    legacy = whole_ranks(before.questioner, edit, asks, along)
    for (measure, ask, _), change, (ranks, firsts) in zip(items, changes, legacy, strict=True):
        locality(rows, measure, ask.sample_id, [replace(change, ranks=ranks, firsts=firsts)])


def _same(reply: str, alt: str) -> bool:
    """Return whether two answers are equal but for case, blanks at the ends and a full stop."""
    return reply.strip().rstrip(".").casefold() == alt.strip().rstrip(".").casefold()
