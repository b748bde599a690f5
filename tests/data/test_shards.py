"""Cutting is a partition of the samples that depends on their sequence alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.data.shards import Manifest, Shard, cut, extend, read_shard
from mmray.data.sources import DataFile, open_source
from mmray.errors import InputError, ShardError
from tests.support.data_files import Row, write_parquet

SIZES = st.lists(st.integers(0, 30), max_size=12)


def files_of(sizes: list[int]) -> list[DataFile]:
    return [DataFile(f"part-{number}", rows, 10 * rows, f"digest-{number}") for number, rows in enumerate(sizes)]


def samples_of(shard: Shard) -> list[tuple[str, int]]:
    return [(piece.path, row) for piece in shard.pieces for row in range(piece.start, piece.stop)]


@given(SIZES, st.integers(1, 40), st.none() | st.integers(0, 400))
def test_every_sample_is_once_in_the_shards_in_order(sizes: list[int], shard_size: int, limit: int | None) -> None:
    files = files_of(sizes)
    manifest = cut(files, shard_size, limit)
    everything = [(file.path, row) for file in files for row in range(file.rows)][:limit]
    assert [sample for shard in manifest.shards for sample in samples_of(shard)] == everything
    assert manifest.samples == len(everything)
    assert [shard.shard_id for shard in manifest.shards] == list(range(len(manifest.shards)))
    assert all(shard.samples == shard_size for shard in manifest.shards[:-1])
    assert all(1 <= shard.samples <= shard_size for shard in manifest.shards[-1:])
    assert all(piece.start < piece.stop for shard in manifest.shards for piece in shard.pieces)


@given(SIZES, st.integers(1, 40))
def test_how_files_split_the_samples_does_not_matter(sizes: list[int], shard_size: int) -> None:
    def numbers(sizes: list[int]) -> list[list[int]]:
        first = {file.path: sum(sizes[:number]) for number, file in enumerate(files_of(sizes))}
        shards = cut(files_of(sizes), shard_size).shards
        return [[first[path] + row for path, row in samples_of(shard)] for shard in shards]

    assert numbers(sizes) == numbers([sum(sizes)]) == numbers([1] * sum(sizes))


@given(SIZES, st.integers(1, 40), st.none() | st.integers(0, 400), st.integers(1, 7))
def test_an_image_s_samples_are_in_one_shard(
    sizes: list[int], shard_size: int, limit: int | None, captions: int
) -> None:
    def image_end(_: str, sample: int) -> int:
        return -(-sample // captions) * captions

    files = files_of(sizes)
    manifest = cut(files, shard_size, limit, image_end)
    everything = [(file.path, row) for file in files for row in range(file.rows)][:limit]
    assert [sample for shard in manifest.shards for sample in samples_of(shard)] == everything
    owners: dict[tuple[str, int], set[int]] = {}
    for shard in manifest.shards:
        for path, row in samples_of(shard):
            owners.setdefault((path, row // captions), set()).add(shard.shard_id)
    assert all(len(shards) == 1 for shards in owners.values())
    assert all(shard_size <= shard.samples < shard_size + captions for shard in manifest.shards[:-1])
    # Rows that are added later are cut like this, too.
    grown = [DataFile(f.path, f.rows + 9, f.size, "new", "rows") for f in files]
    before = Manifest(tuple(DataFile(f.path, f.rows, f.size, f.digest, "rows") for f in files), manifest.shards)
    if limit is None and files:
        after = extend(before, grown, shard_size, None, lambda *_: "rows", image_end)
        rows = [sample for shard in after.shards[len(manifest.shards) :] for sample in samples_of(shard)]
        assert rows == [(f.path, row) for f in files for row in range(f.rows, f.rows + 9)]
        for shard in after.shards[len(manifest.shards) : -1]:
            path, row = samples_of(shard)[-1]
            assert (row + 1) % captions == 0 or row + 1 == {f.path: f.rows for f in grown}[path]


@given(SIZES, st.integers(1, 40), st.none() | st.integers(0, 400))
def test_json_gives_the_manifest_back(sizes: list[int], shard_size: int, limit: int | None) -> None:
    manifest = cut(files_of(sizes), shard_size, limit)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


def test_digest_is_of_the_files_alone() -> None:
    files = files_of([5, 7])
    assert cut(files, 3).digest == cut(files, 4, 2).digest
    assert cut(files, 3).digest != cut(files_of([5, 8]), 3).digest
    assert cut(files, 3).digest != cut(files[::-1], 3).digest


def test_ten_thousand_shards_are_compact() -> None:
    manifest = cut(files_of([10_000] * 256), 256)
    assert len(manifest.shards) == 10_000
    assert len(manifest.to_json()) < 500_000


@pytest.mark.parametrize(("shard_size", "limit"), [(0, None), (-1, None), (1, -1)])
def test_sizes_that_make_no_sense_are_refused(shard_size: int, limit: int | None) -> None:
    with pytest.raises(InputError, match="shard size"):
        cut(files_of([3]), shard_size, limit)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"format":2}', b'{"format":1,"files":[],"shards":[[0,[0,0,1]]]}']
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        Manifest.from_json(data)


def test_data_that_shrank_fails_its_shard(tmp_path, rows: list[Row]) -> None:
    data = str(write_parquet(tmp_path, rows))
    shard = cut(open_source(data).files(), 100).shards[0]
    write_parquet(tmp_path, rows[:4])
    with pytest.raises(ShardError, match=r"data\.parquet gave 4 of the rows 0 to 9"):
        list(read_shard(open_source(data), shard))
