"""The COCO-like data is what it says: five captions per image, the same in both forms, held-out images apart."""

from collections import defaultdict
from pathlib import Path

from mmray.data.samples import Sample, image_digest
from mmray.data.shards import cut, read_shard
from mmray.data.sources import open_source
from tests.support.coco_like import CAPTIONS, CONCEPTS, coco_like
from tests.support.data_files import read_all


def samples(path: Path) -> list[Sample]:
    found = read_all(str(path))
    assert all(isinstance(row, Sample) for row in found), found
    return [row for row in found if isinstance(row, Sample)]


def test_five_captions_per_image_in_both_forms_and_other_images_held_out(tmp_path: Path) -> None:
    data = coco_like(tmp_path, images=10, held_out=4)
    train, exploded = samples(data.train), samples(data.exploded)
    captions: dict[str | None, set[str]] = defaultdict(set)
    for sample in train:
        captions[image_digest(sample.image)].add(sample.caption)
    assert len(captions) == data.images == 10
    assert {len(said) for said in captions.values()} == {CAPTIONS}
    assert len({sample.sample_id for sample in train}) == len(train)
    assert all(set(CONCEPTS) & set(sample.objects or ()) for sample in train)

    def facts(found: list[Sample]) -> set[tuple[object, ...]]:
        return {(one.sample_id, one.caption, one.image, tuple(sorted(one.objects or ()))) for one in found}

    assert facts(exploded) == facts(train)
    assert facts(samples(data.exploded_held_out)) == facts(samples(data.held_out))
    assert not {image_digest(sample.image) for sample in samples(data.held_out)} & captions.keys()
    single = samples(data.single)
    assert [image_digest(sample.image) for sample in single] == list(captions)
    assert {sample.sample_id for sample in single} <= {sample.sample_id for sample in train}


def test_a_census_s_shards_hold_whole_images(tmp_path: Path) -> None:
    source = open_source(str(coco_like(tmp_path, images=10, held_out=1).train))
    for size in (1, 5, 7, 12, 100):
        manifest = cut(source.files(), size, image_end=source.image_end)
        shards = [{str(row.sample_id).partition("-")[0] for row in read_shard(source, s)} for s in manifest.shards]
        assert sum(map(len, shards)) == len(set.union(*shards)) == 10
        assert [shard.samples for shard in manifest.shards[:-1]] == [-(-size // CAPTIONS) * CAPTIONS] * (
            len(shards) - 1
        )
