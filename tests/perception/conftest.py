"""The demo with its detector, scenes that nothing was trained on, and tiny joint models; shared by all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.demo.scenes import Scene, World
from mmray.detector.joint import JointModel, join
from tests.perception.owls import build_owl


@pytest.fixture(scope="session")
def demo(open_model: Callable[[str], Any]) -> Any:
    return open_model("demo")


@pytest.fixture(scope="session")
def joint(demo: Any) -> JointModel:
    return join(demo)


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Scenes of two objects."""
    return [scene for scene in World.load().sample(80, seed=771_000) if len(scene.objects) == 2][:16]


@pytest.fixture(scope="session")
def images(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in World.load().render(scenes)]


@pytest.fixture(scope="session")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny OWL-ViT or OWLv2."""
    return lambda kind: build_owl(kind, tmp_path_factory.mktemp(kind))
