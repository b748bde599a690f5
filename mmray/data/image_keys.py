"""Which samples share an image, so that counts, confidence intervals and hold-outs are of images.

COCO, Flickr and data with one row per caption have several samples per image. An image is identified by the digest of
its bytes. Windows of a long text share its digest in the same way. Any other sample without an image, or of a run that
recorded no digests, is a unit of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa


def image_key(sample_id: str, digest: str | None) -> str:
    """Return the key of a sample's image: its digest, or the sample's id without one."""
    return sample_id if digest is None else digest


def image_keys(captions: pa.Table) -> dict[str, str]:
    """Return sample → image key, from a run's table `captions`."""
    names = captions["sample_id"].to_pylist()
    digests = captions["image"].to_pylist() if "image" in captions.column_names else [None] * len(names)
    return {name: image_key(name, digest) for name, digest in zip(names, digests, strict=True)}


def one_per_image(samples: Iterable[str], images: Mapping[str, str]) -> list[str]:
    """Return the first sample of each image, in order; samples that are not in `images` are all kept."""
    first: dict[str, str] = {}
    for name in samples:
        first.setdefault(images.get(name, name), name)
    return list(first.values())
