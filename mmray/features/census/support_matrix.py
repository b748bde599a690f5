"""Prove every model type that has a tiny checkpoint, on all cores, and write the tables of the models' README."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import textwrap
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from mmray.errors import InputError
from mmray.features.census.model_check import TEXT_ONLY, Ability, abilities_of, check_model
from mmray.models.layout import PROBED
from mmray.models.loading import LoadedModel, load
from mmray.models.tiny.catalogue import CATALOGUE, WITHOUT, untried
from mmray.neurons.validation import Check

SHORT = {
    "heat maps, saliency": "heat maps",
    "captions of an image share a row": "shared rows",
    "edits that are learned": "learned edits",
    "selectivity --steer": "steering",
    "neurons of the vision tower": "vision neurons",
    "neurons of the projector": "projector neurons",
}
"""Abilities by their names in a table."""
COMMAND = "mmray check-model --all --write mmray/models/README.md"


@dataclass(frozen=True)
class Support:
    """What was found out about one type."""

    name: str
    problem: str = ""
    """Why it could not be built or loaded; then nothing else is known."""
    found_by: str = ""
    """`table` or `probe`."""
    projection: str = ""
    """Path of the language MLPs' output projection, with N for the layer."""
    mlp: str = ""
    """`gated`, `plain` or `experts`."""
    image: str = ""
    """`tokens`, `encoder`, `cross-attention` or `none`."""
    vision: int = 0
    """MLPs of the vision tower."""
    projector: int = 0
    checks: tuple[Check, ...] = ()
    abilities: tuple[Ability, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.problem and all(check.passed for check in self.checks)

    @property
    def held(self) -> str:
        """How many checks passed."""
        return f"{sum(check.passed for check in self.checks)} of {len(self.checks)}"

    @property
    def missing(self) -> str:
        """What does not work, of that which works with some models only; for text-only ones without that of images."""
        missing = [SHORT.get(one.name, one.name) for one in self.abilities if one.problem not in ("", TEXT_ONLY)]
        return ", ".join(missing) or "–"


def support_of(name: str, model: LoadedModel) -> Support:
    """Check a loaded model of a type, and return what was found."""
    parts, language = model.parts, model.parts.of("language")
    # The first layers of some have no experts.
    experts = any(projection.experts for projection in language)
    checks = tuple(check_model(model))
    # Of a model that is not understood, nothing else is worth saying.
    sound = all(check.passed for check in checks)
    return Support(
        name,
        found_by="probe" if parts.family == PROBED else "table",
        projection=re.sub(r"\.\d+\.", ".N.", language[-1].path, count=1),
        mlp="experts" if experts else "gated" if language[0].gate else "plain",
        image="encoder" if parts.encoder_decoder else parts.image,
        vision=len(parts.of("vision")),
        projector=len(parts.of("projector")),
        checks=checks,
        abilities=tuple(abilities_of(model)) if sound else (),
    )


def prove(name: str, dtype: str = "fp32") -> Support:
    """Build the tiny checkpoint of a type, load it, and check it; what goes wrong is the `problem`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = load(str(CATALOGUE[name].build(Path(folder))), dtype, "cpu")
            return support_of(name, model)
        except Exception as error:  # noqa: BLE001  whatever breaks, the others must be tried
            return Support(name, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def prove_all(names: Collection[str], dtype: str) -> Iterator[Support]:
    """Yield what `prove` finds out about these types, in order; one process per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Not forked: the threads of this process's torch would be missing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores, len(names)), context, initializer=_start) as pool:
        yield from pool.map(partial(prove, dtype=dtype), names)


def _start() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tables(found: Collection[Support]) -> dict[str, str]:
    """Return the tables of the README by name, in Markdown: of all types that passed."""
    passed = [one for one in found if one.passed]
    return {
        "types": table(IMAGES, [image_row(one) for one in passed if one.image != "none"]),
        "texts": table(TEXTS, [text_row(one) for one in passed if one.image == "none"]),
        "others": others(),
    }


IMAGES = (
    "type",
    "output projection of the language MLPs",
    "MLP",
    "found by",
    "image",
    "vision",
    "projector",
    "checks",
    "does not work",
)
TEXTS = ("type", "output projection of the MLPs", "MLP", "found by", "checks", "does not work")


def image_row(one: Support) -> str:
    """Return the line of a type that takes images."""
    facts = (one.found_by, one.image, str(one.vision), str(one.projector), one.held, one.missing)
    return line((f"`{one.name}`", f"`{one.projection}`", one.mlp, *facts))


def text_row(one: Support) -> str:
    """Return the line of a text-only type."""
    return line((f"`{one.name}`", f"`{one.projection}`", one.mlp, one.found_by, one.held, one.missing))


def others() -> str:
    """Return what is said of image-text types of transformers that no tiny checkpoint is built of."""
    lines = table(("type", "why not"), [line((f"`{name}`", reason)) for name, reason in WITHOUT.items()])
    names = ", ".join(f"`{name}`" for name in untried())
    return f"{lines}\n{textwrap.fill(f'Not checked, for want of a tiny checkpoint: {names}.', 126)}\n"


def table(head: tuple[str, ...], rows: list[str]) -> str:
    """Return a table in Markdown."""
    return "\n".join([line(head), f"|{'---|' * len(head)}", *rows]) + "\n"


def line(cells: tuple[str, ...]) -> str:
    """Return a line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def page_for_tables(file: Path) -> str:
    """Return a README that has the places of all tables; raises InputError if the file is none."""
    try:
        page = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: no page to write tables into ({error})") from error
    for name in tables([]):
        section(page, name)
    return page


def section(page: str, name: str) -> re.Match[str]:
    """Return the place of a table in a README, between its markers; raises InputError if it has none."""
    start, end = (re.escape(mark) for mark in (f"<!-- {name}: {COMMAND} -->\n\n", f"\n<!-- {name} end -->"))
    found = re.search(f"(?<={start}).*?(?={end})", page, re.DOTALL)
    if found is None:
        raise InputError(f"no <!-- {name}: {COMMAND} --> … <!-- {name} end --> in the page: put them where it belongs")
    return found


def written(page: str, made: dict[str, str]) -> str:
    """Return a README with these tables in their places."""
    for name, new in made.items():
        place = section(page, name)
        page = page[: place.start()] + new + page[place.end() :]
    return page
