"""The section of a report on properties: measures over all concepts. Those of one concept are on its own page."""

from __future__ import annotations

from mmray.report.concepts import number
from mmray.report.section import Request, Section


def section(request: Request) -> Section:
    """Return the rows over all concepts in the order of the table, or none if nothing has been measured yet."""
    table = request.run.optional("properties")
    # Popped, because the column is null in all rows of the page.
    rows = [] if table is None else [row for row in table.to_pylist() if row.pop("concept") is None]
    return Section(
        [{name: number(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    )
