"""Parts and tables in pieces, each a file of its own, so that a range of one is read and checked alone.

Pieces of the part `concepts` are the parts `concepts.000`, `concepts.001`, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from mmray.runs.tables import ORDER, list_values, order_of

SMALL_PARTS = 64
"""Tables that are collected before they are joined: in small ones, the schema takes more memory than the rows."""


def piece(name: str, number: int) -> str:
    """Return the name of a piece."""
    return f"{name}.{number:03d}"


def whole_name(name: str) -> str:
    """Return the name of the part or table that a piece is of."""
    return name.partition(".")[0]


def in_pieces(name: str, pieces: Iterable[pa.Table]) -> dict[str, pa.Table]:
    """Return pieces by their names."""
    return {piece(name, number): table for number, table in enumerate(pieces)}


def cut_rows(table: pa.Table, key: str, size: int) -> list[pa.Table]:
    """Return a table that is sorted by a column in pieces of about `size` bytes in memory, at least one.

    The pieces' schema names the column, so that receipts say between which keys each of them lies.
    """
    ordered = table.replace_schema_metadata({ORDER: key})
    rows = max(1, len(table) * size // max(size, table.nbytes))
    return [ordered.slice(first, rows) for first in range(0, max(1, len(table)), rows)]


def cut_between(table: pa.Table, key: str, cuts: Sequence[Any]) -> list[pa.Table]:
    """Return a table that is sorted by a column in pieces that begin at these keys, without empty ones; at least one.

    The pieces' schema names the column, too.
    """
    ordered = table.replace_schema_metadata({ORDER: key})
    edges = [0, *np.searchsorted(table[key].to_numpy(), list(cuts)).tolist(), len(table)]
    return [ordered.slice(first, end - first) for first, end in pairwise(edges) if first < end] or [ordered]


def cut_lists(table: pa.Table, length: int, count: int) -> list[pa.Table]:
    """Return `count` tables of the same rows, whose lists are the next `length` entries each; null lists stay null."""
    lists = {name: list_values(table[name]) for name in table.column_names if pa.types.is_list(table[name].type)}
    return [
        _with_lists(table, {name: [one[first : first + length] for one in own] for name, own in lists.items()})
        for first in range(0, count * length, length)
    ]


def join(pieces: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Return parts whole, given them or their pieces in order."""
    found: dict[str, list[pa.Table]] = {}
    for name, table in pieces.items():
        found.setdefault(whole_name(name), []).append(table)
    return {name: _joined(tables) for name, tables in found.items()}


def _joined(tables: list[pa.Table]) -> pa.Table:
    if len(tables) == 1 or order_of(tables[0].schema):
        return pa.concat_tables(tables)
    names = [name for name in tables[0].column_names if pa.types.is_list(tables[0][name].type)]
    lists = {name: [list_values(table[name]) for table in tables] for name in names}
    return _with_lists(
        tables[0], {name: [np.concatenate(own) for own in zip(*found, strict=True)] for name, found in lists.items()}
    )


def _with_lists(table: pa.Table, lists: Mapping[str, list[ndarray]]) -> pa.Table:
    """Return the table with these lists in place of its own, null where they are."""
    for name, own in lists.items():
        kind, column = table.schema.field(name).type, table[name].combine_chunks()
        offsets = pa.array(np.cumsum([0, *map(len, own)]), pa.int32())
        values = pa.array(np.concatenate(own) if own else [], kind.value_type)
        missing = pa.array(column.is_null().to_numpy(zero_copy_only=False))
        replaced = pa.ListArray.from_arrays(offsets, values, kind, mask=missing)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), replaced)
    return table


class TableCutter:
    """Joins tables that are added in order, and cuts them into pieces of about `size` bytes in memory."""

    def __init__(self, schema: pa.Schema, size: int) -> None:
        self.schema = schema
        self.size = size
        self._joined: list[pa.Table] = []
        self._small: list[pa.Table] = []
        self._bytes = 0

    def add(self, part: pa.Table) -> Iterable[pa.Table]:
        """Add a table; return the piece that is full now, if there is one."""
        self._small.append(part)
        self._bytes += part.nbytes
        if len(self._small) == SMALL_PARTS:
            self._join_small()
        return [self.rest()] if self._bytes >= self.size else []

    @property
    def empty(self) -> bool:
        """Whether nothing waits for the next piece."""
        return not (self._bytes or self._small)

    def rest(self) -> pa.Table:
        """Return what is not in a piece yet."""
        self._join_small()
        table = pa.concat_tables(self._joined)
        self._joined, self._bytes = [], 0
        return table

    def _join_small(self) -> None:
        # Parts committed by an earlier version may lack a newer column, which is then filled with nulls.
        whole = pa.concat_tables([self.schema.empty_table(), *self._small], promote_options="default")
        self._joined.append(whole.combine_chunks())
        self._small = []


def bounds_of(table: pa.Table) -> dict[str, list[Any]]:
    """Return the lowest and highest value of each column by which a table is ordered; None if it has no row."""
    return {column: list(pc.min_max(table[column]).as_py().values()) for column in order_of(table.schema)}
