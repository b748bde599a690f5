"""A toy analysis in one file: how often each letter begins a line of a text file, per unit of ten lines."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from mmray.engine import Job, JobSettings, Output, Parts, Plan, Unit, UnitResult, Worker, after_work, known_by_digest
from mmray.errors import InputError

LINES = 10


class LetterSettings(JobSettings):
    """Count how often each letter begins a line of a text file."""

    run: str = known_by_digest()
    """Folder that the table is written to."""
    text: str = known_by_digest()
    """File with a line per sample."""
    upper: bool = False
    """Count upper-case letters."""
    most: int = after_work(26, ge=1)
    """Letters in the table."""


class LetterJob(Job[LetterSettings, None]):
    name = "letters"
    unit_noun = "lines"
    parts: ClassVar = {"counts": pa.schema([("letter", pa.string()), ("n", pa.int64())])}

    @property
    def target(self) -> str:
        return self.settings.run

    def plan(self) -> Plan[None]:
        path = Path(self.settings.text)
        if not path.is_file():
            raise InputError(f"{self.settings.text}: no such file")
        lines = path.read_text().splitlines()
        units = [Unit(len(lines[i : i + LINES]), lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
        return Plan(units, {"text": hashlib.sha256(path.read_bytes()).hexdigest()}, None)

    def worker(self, context: None) -> Worker:
        def count(unit: Unit) -> UnitResult:
            letters = Counter((line.upper() if self.settings.upper else line)[:1] for line in unit.payload)
            rows = {"letter": list(letters), "n": list(letters.values())}
            return UnitResult({"counts": pa.table(rows, self.parts["counts"])})

        return count

    def merge(self, plan: Plan[None], parts: Parts, output: Output) -> dict[str, int]:
        total = parts.table("counts").group_by("letter").aggregate([("n", "sum")]).rename_columns(["letter", "n"])
        rows = total.sort_by("letter").slice(0, self.settings.most)
        output.table("letters", rows)
        output.table("total", pa.table({"n": [sum(rows["n"].to_pylist())]}))
        return {"letters": len(rows)}
