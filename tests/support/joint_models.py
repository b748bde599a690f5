"""The demo with its detector, scenes that nothing was trained on, and tiny joint models; shared by all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def joint(demo: Any) -> Any:
    from mmray.detector.joint import join

    return join(demo)


@pytest.fixture(scope="session")
def drawn_scenes() -> list[Any]:
    """Scenes of two objects."""
    from jobs.demo.scenes import World

    return [scene for scene in World.load().sample(80, seed=771_000) if len(scene.objects) == 2][:10]


@pytest.fixture(scope="session")
def images(drawn_scenes: list[Any]) -> list[Any]:
    """Pictures of the scenes."""
    from PIL import Image

    from jobs.demo.scenes import World

    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in World.load().render(drawn_scenes)]


@pytest.fixture(scope="session")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny OWL-ViT or OWLv2."""
    from tests.support.owls import build_owl

    return lambda kind: build_owl(kind, tmp_path_factory.mktemp(kind))
