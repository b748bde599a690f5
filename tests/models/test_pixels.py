"""The pixels of an image are counted where they are most: as decoded, or as the family's processor enlarges it."""

import io
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.data.images import LARGEST_RATIO
from mmray.models.pixels import pixels_of, within_budget
from mmray.models.prompting import prompt_text, run_processor
from mmray.models.tiny.variants import VARIANTS


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 40), st.integers(1, 8) | st.none())
def test_parts_are_neighbours_within_the_budget_and_as_few_as_can_be(
    weights: list[int], budget: int, most: int | None
) -> None:
    parts = list(within_budget(weights, lambda weight: weight, budget, most))
    assert [weight for part in parts for weight in part] == weights
    assert all(sum(part) <= budget or len(part) == 1 for part in parts)
    assert all(len(part) <= (most or len(weights)) for part in parts)
    assert all(sum(part) + after[0] > budget or len(part) == most for part, after in pairwise(parts))


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


ROUNDING = 8192
"""Pixels by which families round up to whole patches or tiles."""


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("qwen3_vl_moe", "instructblip_vicuna")])
def test_what_the_processor_makes_of_a_whole_image_is_counted(
    open_model: Callable[[str], Any], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(variant)
    processor = type(model.processor.image_processor)
    made: list[int] = []
    resize = processor.resize

    def spied(self: Any, *arguments: Any, **options: Any) -> Any:
        found = resize(self, *arguments, **options)
        made.append(found.shape[-1] * found.shape[-2])
        return found

    monkeypatch.setattr(processor, "resize", spied)
    for size in ((40, 56), (120, 8), (3, 90), (800, 4), (300, 200)):
        made.clear()
        image = PIL.Image.open(io.BytesIO(png(*size)))
        with suppress(Exception):  # some refuse narrow images
            run_processor(model, [prompt_text(model, None, "en")], [image])
        counted = pixels_of(model, png(*size))
        assert counted >= size[0] * size[1]
        assert max(made, default=0) <= counted + ROUNDING
        if variant in ("llava", "vipllava") and size == (800, 4):
            assert counted == max(made) == 32 * 32 * LARGEST_RATIO


def test_no_image_has_no_pixels(open_model: Callable[[str], Any]) -> None:
    model = open_model("llava")
    assert [pixels_of(model, data) for data in (None, b"", b"no image", png(1, 150_000))] == [0, 0, 0, 0]
