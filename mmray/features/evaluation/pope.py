"""Measure an edit on POPE's released questions, about the images that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmray.data.images import LARGEST_FILE, decode_image
from mmray.errors import InputError
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.chair import pope
from mmray.features.evaluation.comparing import compare
from mmray.features.evaluation.draft_verifier import without_failures
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Edit, Query
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.objects.answers import Parser
from mmray.objects.pope_files import PopeFiles, PopeQuestion, read_pope
from mmray.storage import LocalStore, S3Store, open_store

NAME = "pope: "
"""Prefix of an image's name in `sample_id`."""

TRIED = 20
"""Images of which one at least has to be there."""

Asked = tuple[str, tuple[PopeQuestion, ...]]
"""An image's name, and its questions."""


def measure_pope(baseline: BaselineReplies, edit: Edit, files: PopeFiles, parser: Parser) -> MeasurementBuffer:
    """Return the measurements of released questions; an image that can't be read is a row in `errors`."""
    rows = MeasurementBuffer()
    store = open_store(files.folder)
    read = [(asked, _encoded(store, asked[0])) for asked in files.images]
    for part in within_budget(read, lambda pair: pixels_of(baseline.model, pair[1]), BUDGET):
        rows.extend(_measured(baseline, edit, part, parser))
    return rows


def _encoded(store: LocalStore | S3Store, name: str) -> bytes | None:
    try:
        return store.read_at_most(name, LARGEST_FILE)
    except (OSError, ValueError):
        return None


def _measured(
    baseline: BaselineReplies, edit: Edit, images: Sequence[tuple[Asked, bytes | None]], parser: Parser
) -> MeasurementBuffer:
    """Return the measurements of images that fit in the budget together."""
    failures: list[dict[str, object]] = []

    def fail(name: str, stage: str, reason: str) -> None:
        failures.append({"sample_id": NAME + name, "source": name, "stage": stage, "message": reason})

    queries: dict[str, list[tuple[PopeQuestion, Query]]] = {}
    for (name, questions), content in images:
        try:
            if content is None:
                raise ValueError("no such image, or it is too large")
            picture = decode_image(content)
        except ValueError as error:
            fail(name, "read", str(error))
            continue
        texts = [prompt_text(baseline.model, question.text, "en") for question in questions]
        asked = [Query(NAME + name, text, picture, variant=name) for text in texts]
        queries[name] = list(zip(questions, asked, strict=True))

    def drop(query: Query, reason: str) -> None:
        queries.pop(query.variant)
        fail(query.variant, "forward", reason)

    def measured() -> MeasurementBuffer:
        rows = MeasurementBuffer()
        # Questions about present objects are in every file: each is asked once.
        every = list({query.key: query for own in queries.values() for _, query in own}.values())
        # Nearly every answer is one of these: verifying both is cheaper than generating.
        replies = baseline.replies(every, [["Yes", "No"]] * len(every))
        changes = compare(baseline.verifier, edit, every, replies)
        found = {query.key: change for query, change in zip(every, changes, strict=True)}
        for name, own in queries.items():
            said = {query.prompt: found[query.key] for _, query in own}
            for strategy in dict.fromkeys(question.strategy for question, _ in own):
                sides: dict[bool, list[str]] = {True: [], False: []}
                for question, query in own:
                    if question.strategy == strategy:
                        sides[question.present].append(query.prompt)
                pope(rows, NAME + name, sides[True], {strategy: sides[False]}, said, parser)
        return rows

    rows = without_failures(measured, drop)
    rows.errors.extend(failures)
    return rows


def open_pope(uris: Sequence[str], images: str | None) -> PopeFiles:
    """Return the questions of files, whose images are in a folder, by default that of the first file.

    Raises InputError for a file of another form, and for a folder without any of the images.
    """
    files = read_pope(uris)
    files = replace(files, folder=images or files.folder)
    store = open_store(files.folder)
    names = [name for name, _ in files.images]
    # A wrong folder has none of them, a right one may lack some; asking for each of thousands would take long.
    if all(store.entry(name) is None for name in names[:TRIED]):
        raise InputError(f"--pope {uris[0]}: no image such as {names[0]} in {files.folder}; see --pope-images")
    return files


def part_of(files: PopeFiles, part: slice) -> PopeFiles:
    """Return the questions about some of the images."""
    return replace(files, images=files.images[part])
