"""The networks of the tiny checkpoints, and inputs for them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import transformers

from tests.support.networks import Loaded, example


@pytest.fixture(scope="session")
def loaded(tiny: Callable[[str], Path]) -> Callable[[str], Loaded]:
    """Return a variant's network, shared by all tests: leave it as it was."""
    transformers.utils.logging.disable_progress_bar()

    @cache
    def load(variant: str) -> Loaded:
        folder = tiny(variant)
        processor = transformers.AutoProcessor.from_pretrained(folder)
        network = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)
        return Loaded(network, processor, example(variant, processor))

    return load
