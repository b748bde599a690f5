"""What an image shows is what is decoded: in every mode of Pillow, with alpha, 16 bits, floats and orientation."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy import ndarray
from PIL import ImageChops, ImageOps

from mmray.data import images
from mmray.data.columns import Columns
from mmray.data.images import LARGEST_FILE, LARGEST_RATIO, TURNS, decode_image, read_image, to_rgb
from mmray.errors import InputError
from mmray.features.census.settings import census_settings
from mmray.neurons.model import open_image
from tests.support.data_files import Row, read_all, write_parquet

PIXELS = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(4)))


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data: bytes, background: str = "white") -> ndarray:
    return np.asarray(decode_image(data, background))


def over(pixels: ndarray, background: tuple[int, int, int]) -> ndarray:
    """The colour of each pixel before a background, by the definition of alpha."""
    alpha = pixels[..., 3:].astype(float) / 255
    return pixels[..., :3] * alpha + np.array(background) * (1 - alpha)


@settings(deadline=None)
@given(PIXELS, st.sampled_from([("white", (255, 255, 255)), ("#102030", (16, 32, 48))]))
def test_alpha_is_composited_on_the_background(pixels: ndarray, background: tuple[str, tuple[int, int, int]]) -> None:
    name, colour = background
    rgba = PIL.Image.fromarray(pixels, "RGBA")
    assert np.abs(shown(encoded(rgba), name) - over(pixels, colour)).max() <= 1
    grey = np.repeat(pixels[..., :1], 4, axis=2)
    grey[..., 3] = pixels[..., 3]
    la = PIL.Image.fromarray(np.ascontiguousarray(pixels[..., [0, 3]]), "LA")
    assert np.abs(shown(encoded(la), name) - over(grey, colour)).max() <= 1


@settings(deadline=None)
@given(PIXELS)
def test_opaque_pictures_are_what_pillow_makes_of_them(pixels: ndarray) -> None:
    pixels[..., 3] = 255
    rgb = np.ascontiguousarray(pixels[..., :3])
    for image in (PIL.Image.fromarray(pixels, "RGBA"), PIL.Image.fromarray(rgb)):
        for background in ("white", "red"):
            assert np.array_equal(shown(encoded(image), background), rgb)
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"):
        image = PIL.Image.fromarray(rgb).convert(mode)
        assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB"))), mode


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_the_transparent_colour_of_a_png_or_gif_is_background(mode: str) -> None:
    image = PIL.Image.new("RGB", (4, 2), "black")
    image.paste("white", (0, 0, 2, 2))
    image = image.convert(mode)
    key = image.getpixel((3, 0))
    for kind in ("PNG", "GIF") if mode == "P" else ("PNG",):
        found = shown(encoded(image, kind, transparency=key), "red")
        assert (found[:, 2:] == [255, 0, 0]).all() and (found[:, :2] == 255).all()
    if mode == "P":
        alpha = bytes(0 if index == key else 255 for index in range(256))
        assert np.array_equal(shown(encoded(image, transparency=alpha), "red"), found)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_rarer_modes_with_alpha(mode: str) -> None:
    image = PIL.Image.new("RGBA", (3, 1), "black")
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "PA":  # Pillow's own conversion to this mode drops alpha
        image = PIL.Image.frombytes("PA", (3, 1), bytes([0, 255, 0, 0, 0, 255]))
    else:
        image = (image.convert("LA") if mode == "La" else image).convert(mode)
    assert np.asarray(to_rgb(image, "#010203"))[0].tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 0]]


@settings(deadline=None)
@given(arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_16_bits_are_scaled_to_8(values: ndarray) -> None:
    expected = np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(shown(encoded(PIL.Image.fromarray(values), kind)), expected), kind
    assert np.array_equal(np.asarray(to_rgb(PIL.Image.fromarray(values.astype(np.int32)))), expected)
    swapped = PIL.Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(to_rgb(swapped)), expected)


def test_a_16_bit_gradient_keeps_its_256_greys_and_its_transparent_value() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    assert len(np.unique(shown(encoded(PIL.Image.fromarray(values))))) == 256
    data = encoded(PIL.Image.fromarray(values))
    head = data.index(b"IDAT") - 4
    body = b"tRNS" + struct.pack(">H", 1600)
    data = data[:head] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + data[head:]
    found = shown(data, "red")
    assert found[1, 36].tolist() == [255, 0, 0]
    assert (found == [255, 0, 0]).all(axis=2).sum() == 1


@settings(deadline=None)
@given(arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)), st.floats(2, 1e6), st.floats(-1e6, 1e6))
def test_floats_are_scaled(values: ndarray, factor: float, offset: float) -> None:
    found = shown(encoded(PIL.Image.fromarray(values), "TIFF"))[..., 0]
    assert np.abs(found - values * 255).max() <= 0.5001
    values[0, :2] = 0, 1
    wide = (values.astype(np.float64) * factor + offset).astype(np.float32)
    if wide.min() < 0 or wide.max() > 1:
        stretched = (wide.astype(np.float64) - wide.min()) / (float(wide.max()) - float(wide.min()) or 1)
        assert np.abs(shown(encoded(PIL.Image.fromarray(wide), "TIFF"))[..., 0] - stretched * 255).max() <= 0.5001


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(value: float) -> None:
    values = np.zeros((2, 2), np.float32)
    values[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        shown(encoded(PIL.Image.fromarray(values), "TIFF"))


def test_other_integers_are_stretched_from_their_range() -> None:
    values = np.array([[-100, 0], [100_000, 50_000]], np.int32)
    assert shown(encoded(PIL.Image.fromarray(values), "TIFF"))[..., 0].tolist() == [[0, 0], [255, 128]]
    assert not shown(encoded(PIL.Image.new("F", (2, 2), 7.0), "TIFF")).any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :20], pixels[12:, 20:] = (255, 0, 0), (0, 255, 0)
    image = PIL.Image.fromarray(pixels)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image.getexif()[0x0112] = orientation
    found = decode_image(encoded(image, kind, exif=exif, **options))
    expected = ImageOps.exif_transpose(image).convert("RGB")
    assert found.size == expected.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert np.asarray(ImageChops.difference(found, expected)).max() <= 4
    assert set(TURNS) == set(range(2, 9))


def test_damaged_exif_data_leaves_the_picture() -> None:
    image = PIL.Image.new("RGB", (3, 2), "red")
    for exif in (b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"x" * 40):
        assert decode_image(encoded(image, "JPEG", exif=exif)).size == (3, 2)


@pytest.mark.parametrize("colour", ["red", "green", "blue", "black", "white", "yellow"])
def test_cmyk(colour: str) -> None:
    """Written by Pillow with Adobe's marker, as most programs do: the ink is stored inverted."""
    image = PIL.Image.new("RGB", (8, 8), colour)
    for kind in ("JPEG", "TIFF"):
        found = shown(encoded(image.convert("CMYK"), kind))
        assert np.abs(found.astype(int) - np.asarray(image)).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (shown(data) == [255, 0, 0]).all()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "IM", "SGI", "PDF", "EPS"])
def test_formats_are_an_allow_list(kind: str) -> None:
    data = encoded(PIL.Image.new("RGB", (16, 16)), kind)
    with pytest.raises(ValueError, match=r"^of no known format$"):
        decode_image(data)
    for form in images.image_formats():
        assert decode_image(encoded(PIL.Image.new("RGB", (16, 16), "red"), form)).size == (16, 16)


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "picture.png").write_bytes(EPS)
    with pytest.raises(ValueError, match="no known format"):
        decode_image(EPS)
    with pytest.raises(InputError, match=r"picture\.png: not an image that can be read"):
        open_image(tmp_path / "picture.png")
    assert not (tmp_path / "ran").exists()


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"one side is more than {LARGEST_RATIO} times the other"):
        decode_image(encoded(PIL.Image.new("1", (150_000, 1))))
    assert decode_image(encoded(PIL.Image.new("1", (LARGEST_RATIO, 1)))).size == (LARGEST_RATIO, 1)
    with pytest.raises(ValueError, match=f"{LARGEST_FILE + 1:,} bytes, more than {LARGEST_FILE:,}"):
        decode_image(bytes(LARGEST_FILE + 1))
    with pytest.raises(ValueError, match="more than 178,956,970 pixels"):
        decode_image(encoded(PIL.Image.new("1", (13_500, 13_500))))
    monkeypatch.setattr(images, "LARGEST_IMAGE", 100)
    with pytest.raises(ValueError, match="11 × 10 pixels, more than 100"):
        decode_image(encoded(PIL.Image.new("1", (11, 10))))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_pipes_and_devices_are_refused_unread(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_image(tmp_path / "picture.png")


def test_files_too_large_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "picture.jpg").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(ValueError, match=r"2,147,483,648 bytes, more than 67,108,864"):
        read_image(tmp_path / "picture.jpg")


def test_python_reads_pictures_as_the_data_does(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    image = PIL.Image.fromarray(pixels, "RGBA")
    (tmp_path / "picture.png").write_bytes(encoded(image))
    for given_as in (image, tmp_path / "picture.png", str(tmp_path / "picture.png"), encoded(image)):
        found = open_image(given_as)
        assert found is not None and (np.asarray(found) == 255).all()
    assert (np.asarray(open_image(image, "black")) == 0).all()
    with pytest.raises(InputError, match=r"none\.png: not an image that can be read \(No such file or directory\)"):
        open_image(tmp_path / "none.png")


def test_the_background_is_a_setting_that_samples_carry(tmp_path: Path, rows: list[Row]) -> None:
    settings = {"model": "demo", "data": "demo", "out": "run"}
    plain, black = census_settings(settings), census_settings(settings | {"background": "black"})
    assert plain.fingerprint({}) != black.fingerprint({})
    assert black.result_settings()["background"] == "black"
    for wrong in ("no colour", "#12", "#11223344", "rgba(0, 0, 0, 0)"):
        with pytest.raises(InputError, match=r"setting background = .*: .*not an opaque colour"):
            census_settings(settings | {"background": wrong})
    data = str(write_parquet(tmp_path, rows))
    assert {row.background for row in read_all(data)} == {"white"}
    assert {row.background for row in read_all(data, columns=Columns(background="#000"))} == {"#000"}
