"""Views of a sample: the same for the same seed, of the image's own pixels, and nothing where there is none."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps

from mmray.data.samples import Sample
from mmray.features.editing.augmentation import SMALLEST_SIDE, views
from mmray.neurons.model import open_image


def sample_of(image: Image.Image) -> Sample:
    written = io.BytesIO()
    image.save(written, "png")
    return Sample("one", "here", written.getvalue(), "a caption")


def test_views_show_the_image_s_own_pixels() -> None:
    pixels = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    pixels[..., 1], pixels[..., 2] = np.arange(40)[:, None], np.arange(60)[None]  # every pixel says where it is
    image = Image.fromarray(pixels)
    sample = sample_of(image)
    mirrored, cut = views(sample, 0)
    assert np.array_equal(ImageOps.mirror(open_image(mirrored.image)), pixels)
    part = np.asarray(open_image(cut.image))
    top, left = part[0, 0, 1:]
    height, width = part.shape[:2]
    assert np.array_equal(part, pixels[top : top + height, left : left + width])
    assert height >= SMALLEST_SIDE * 40 - 1
    assert width >= SMALLEST_SIDE * 60 - 1
    assert len({view.sample_id for view in (sample, mirrored, cut, *views(sample, 1))}) == 5
    assert views(sample, 0) == [mirrored, cut]
    assert any(views(sample, seed)[1].image != cut.image for seed in range(1, 4))


def test_what_has_no_image_has_no_views() -> None:
    assert views(replace(sample_of(Image.new("RGB", (4, 4))), image=None), 0) == []
