"""A part in pieces is the same part, and receipts say what each of them holds."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import DamagedError
from mmray.runs import RunFolder
from mmray.runs.pieces import cut_lists, cut_rows, in_pieces, join
from mmray.runs.tables import ERRORS
from mmray.storage import LocalStore

LISTS = pa.schema([("label", pa.string()), ("n", pa.list_(pa.int64())), ("sum", pa.list_(pa.float64()))])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=4), st.integers(1, 5))
def test_lists_are_cut_and_joined(rows: list[tuple[bool, int]], length: int) -> None:
    # Lists of different modules differ in length; some are null.
    lists = [[number + 10 * row for number in range(size)] for row, (_, size) in enumerate(rows)]
    values = [found if there else None for (there, _), found in zip(rows, lists, strict=True)]
    table = pa.table({"label": list(map(str, range(len(rows)))), "n": values, "sum": lists}, schema=LISTS)
    pieces = cut_lists(table, length, -(-9 // length))
    assert all(len(one) <= length for piece in pieces for one in piece["sum"].to_pylist())
    assert join(in_pieces("some", pieces)) == {"some": table}


@given(st.lists(st.sampled_from("abcdefgh"), max_size=12).map(sorted), st.integers(1, 60))
def test_rows_are_cut_and_joined(keys: list[str], size: int) -> None:
    table = pa.table({"key": pa.array(keys, pa.string()), "value": range(len(keys))})
    pieces = cut_rows(table, "key", size)
    assert len(pieces) == 1 or all(map(len, pieces))
    assert max(map(len, pieces)) <= max(1, len(table) * size // max(1, table.nbytes))
    assert join(in_pieces("some", pieces))["some"].equals(table)


def test_a_receipt_says_what_each_piece_holds(tmp_path: Path) -> None:
    folder = RunFolder(LocalStore(tmp_path))
    table = pa.table({"key": ["a", "b", "b", "c"], "value": [1, 2, 3, 4]})
    tables = in_pieces("some", cut_rows(table, "key", table.nbytes // 2)) | {"errors": ERRORS.empty_table()}
    receipt = folder.commit_shard(0, tables, 1, 1.0)
    assert receipt.bounds == {"some.000": {"key": ["a", "b"]}, "some.001": {"key": ["b", "c"]}}
    assert folder.receipts() == {0: receipt}
    Path(tmp_path, (receipt.parts or {})["some.001"]).write_bytes(b"nonsense")
    assert folder.read_part(receipt, "some.000").equals(table.slice(0, 2))
    for read in (folder.read_part, folder.read_file):
        with pytest.raises(DamagedError, match=r"some.001.parquet: 8 bytes instead of"):
            read(receipt, "some.001")
