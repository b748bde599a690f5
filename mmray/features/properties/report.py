"""The properties of a report: the measures over all concepts. Those of one concept stand on its own page."""

from __future__ import annotations

from mmray.report.concepts import number
from mmray.report.section import Request, Section


def section(request: Request) -> Section:
    """Return the rows over all concepts, in the order of the table; none where nothing has been measured yet."""
    table = request.run.optional("properties")
    rows = [] if table is None else [row for row in table.to_pylist() if row.pop("concept") is None]
    return Section(
        [{name: number(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    )
