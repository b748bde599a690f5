"""What `--help` leaves out of an option's documentation, as a table in a room's README: run it with `--write`.

The README of a room has the options of its own; those of every job are in the engine's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic import BaseModel

from mmray.engine.settings import JobSettings
from mmray.features.census.settings import CensusSettings
from mmray.features.editing.settings import EditSettings
from mmray.features.evaluation.settings import EvaluationSettings
from mmray.features.hallucination.settings import HallucinationSettings, PerturbationSettings
from mmray.features.saliency.settings import SaliencySettings
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.terminal.help import summary
from tests.bench.writing import markdown, write

COMMAND = "python -m tests.support.option_details --write"
ROOMS: dict[str, tuple[type[BaseModel], ...]] = {
    "mmray/engine/README.md": (JobSettings,),
    "mmray/features/census/README.md": (CensusSettings,),
    "mmray/features/editing/README.md": (EditSettings,),
    "mmray/features/evaluation/README.md": (EvaluationSettings,),
    "mmray/features/hallucination/README.md": (HallucinationSettings, PerturbationSettings),
    "mmray/features/saliency/README.md": (SaliencySettings,),
    "mmray/features/selectivity/README.md": (SelectivitySettings,),
}
"""README → settings whose options it explains. Rooms that are not listed have no options to explain."""
IN_METHOD = {(CensusSettings, "score"), (EditSettings, "method")}
"""Options whose values have a table of their own under Method."""


def table(readme: str) -> str:
    """Return the table of a room's options that need more than `--help` says."""
    rows = dict(row for settings in ROOMS[readme] for row in details(settings))
    return markdown(("option", "details"), list(rows.items()))


def details(settings: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield option and documentation, for each option whose documentation is longer than its summary."""
    shared = set(JobSettings.model_fields) if settings is not JobSettings else set()
    for name, field in settings.model_fields.items():
        text = " ".join((field.description or "").split())
        if (settings, name) not in IN_METHOD and name not in shared and text.rstrip(".") != summary(text).rstrip("."):
            yield f"`--{name.replace('_', '-')}`", text.replace("|", "\\|")


if __name__ == "__main__":
    for page in ROOMS:
        if "--write" in sys.argv[1:]:
            write(page, COMMAND, table(page))
        else:
            print(table(page))
