"""What is committed of a run → its tables, read shard by shard: memory does not grow with the number of shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from mmray.neurons.merging import APPENDED, RunMerge
from mmray.neurons.ranking import certified_share
from mmray.runs import Receipt, RunFolder
from mmray.runs.receipts import receipts_digest, skipped
from mmray.storage import Checksum
from mmray.writing import TableWriter, write_table

DECODED = "decoded.parquet"
"""Key of what every neuron writes: made once a run."""
MERGED = ("concepts", "totals", "activity", "examples", *APPENDED)
"""Parts of a shard that the merge reads."""
AHEAD = 3
"""Shards whose parts are being read while another is added up."""
READERS = 8


def merge_run(folder: RunFolder, widths: Sequence[int], top_k: int, modules: Mapping[str, Sequence[int]]) -> None:
    """Write the tables of all that is committed, and then the totals.

    What another driver or a late worker commits meanwhile is taken in too: the tables are made again. Raises
    DamagedUnitError for a part that is not what was committed.
    """
    receipts = folder.receipts()
    while True:
        _write_tables(folder, receipts, widths, top_k, modules)
        now = folder.receipts()
        if receipts_digest(now) == receipts_digest(receipts):
            return
        receipts = now


def is_merged(folder: RunFolder, receipts: dict[int, Receipt]) -> bool:
    """Tell whether the run's tables are made from these receipts."""
    finished = folder.finished()
    return finished is not None and finished.get("receipts") == receipts_digest(receipts) and folder.has_tables()


def _write_tables(
    folder: RunFolder,
    receipts: dict[int, Receipt],
    widths: Sequence[int],
    top_k: int,
    modules: Mapping[str, Sequence[int]],
) -> None:
    # Readers are not to take tables of two versions for those of a finished run.
    folder.store.delete("finished.json")
    merge = RunMerge(widths, folder.read_table(DECODED), top_k, modules)
    files: dict[str, Checksum] = {}
    writers = {name: TableWriter(folder.store, name) for name in APPENDED}
    for parts in _parts(folder, receipts.values()):
        for name, rows in merge.add(parts.__getitem__).items():
            writers[name].add(rows)
    for writer in writers.values():
        writer.close()
        files |= writer.written
    certified = None
    for name, table in merge.tables():
        files |= write_table(folder.store, name, [table])
        if name == "rankings":
            certified = certified_share(table)
    done = receipts.values()
    folder.finish(
        {
            "receipts": receipts_digest(receipts),
            "samples": sum(receipt.samples for receipt in done),
            "failures": sum(receipt.failures for receipt in done),
            "skipped": skipped(done),
            "quarantined": folder.reasons(receipts),
            "occurrences": sum(receipt.occurrences for receipt in done),
            "concepts": len(merge.concepts.concepts),
            "certified": certified,
            "compute_seconds": round(sum(receipt.seconds for receipt in done), 3),
        },
        files,
    )


def _parts(folder: RunFolder, receipts: Iterable[Receipt]) -> Iterator[dict[str, pa.Table]]:
    """Yield the parts of each shard in order, those of the next ones being read meanwhile."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[dict[str, Future[pa.Table]]] = deque()
        for receipt in receipts:
            waiting.append({name: pool.submit(folder.read_part, receipt, name) for name in MERGED})
            if len(waiting) > AHEAD:
                yield {name: part.result() for name, part in waiting.popleft().items()}
        while waiting:
            yield {name: part.result() for name, part in waiting.popleft().items()}
