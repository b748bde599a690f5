"""Which samples are of one image: what counts, wherever a number, an interval or a hold-out is of images.

COCO, Flickr and data with one row per caption have several samples per image. An image is known by the digest of its
bytes; a sample without an image, or one of a run that did not record digests, is a unit of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa


def image_key(sample_id: str, digest: str | None) -> str:
    """Return the key of a sample's image: its digest; the sample's id where there is none."""
    return sample_id if digest is None else digest


def image_keys(captions: pa.Table) -> dict[str, str]:
    """Return sample → key of its image, from a run's table `captions`."""
    names = captions["sample_id"].to_pylist()
    digests = captions["image"].to_pylist() if "image" in captions.column_names else [None] * len(names)
    return {name: image_key(name, digest) for name, digest in zip(names, digests, strict=True)}


def one_per_image(samples: Iterable[str], images: Mapping[str, str]) -> list[str]:
    """Return the first sample of each image, in order; one that `images` does not know is a unit of its own."""
    first: dict[str, str] = {}
    for name in samples:
        first.setdefault(images.get(name, name), name)
    return list(first.values())
