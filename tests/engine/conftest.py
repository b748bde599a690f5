"""The toy job, ready to be asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.engine import checked
from tests.engine.jobs import prepare
from tests.engine.suite import Suite
from tests.support.letters import LINES
from tests.support.words import LetterJob, LetterSettings


@pytest.fixture
def letters(tmp_path: Path) -> Callable[..., LetterJob]:
    """Return what makes the toy job, on ten units of text, with these settings."""
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    known = {"run": str(tmp_path / "run"), "text": str(tmp_path / "text.txt"), "local": True}
    return lambda **settings: LetterJob(checked(LetterSettings, known | settings))


@pytest.fixture(scope="session")
def suite(tiny: Callable[[str], Path], memory: Path) -> Suite:
    (memory / "base").mkdir()
    return Suite(prepare(memory / "base", tiny("llava")), memory)
