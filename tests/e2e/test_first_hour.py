"""The first hour of a user with images of their own: each command is what the one before printed as next.

What is in capitals there is the user's to fill in. Options that only save time are added.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from mmray.runs.run import open_run
from tests.support.command import Answer
from tests.support.hub import Hub, hub_here
from tests.support.stars import star_folder

QUICKER = {
    "census": ["--local"],
    "properties": ["--local", "--concepts", "1", "--images", "2", "--maps", "1", "--longest", "4", "--draws", "20"],
    "edit": ["--kept", "8", "--samples", "4", "--neurons", "40", "--steps", "3", "--allow-collateral"],
    "evaluate": ["--local", "--limit", "4", "--shard-size", "4", "--text-count", "2", "--pope-objects", "0"],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_here() as here:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here.endpoint)
        yield here


class Walk:
    """A user who runs what the last command printed as next."""

    def __init__(self, mmray: Callable[..., Answer], given: dict[str, str]) -> None:
        self.mmray, self.given, self.nexts = mmray, given, [""]

    def __call__(self, name: str, *words: str) -> str:
        """Run the command of this name among those that were printed, and return its output."""
        if not words:
            (line,) = (line for line in self.nexts if line.startswith(f"mmray {name} "))
            words = tuple(self.given.get(word, word) for word in shlex.split(line)[2:])
        answer = self.mmray(name, *words, *QUICKER.get(name, []))
        assert answer.status == 0, (name, answer.out, answer.err)
        (said,) = re.findall(r"^next: (.*)$", answer.out, re.MULTILINE)
        self.nexts = said.split(" · ")
        return answer.out


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_data_set_that_others_load(mmray: Callable[..., Answer], tmp_path: Path, hub: Hub):
    images, others = star_folder(tmp_path / "stars", 32), star_folder(tmp_path / "others", 12, seed=1)
    run, edit = str(tmp_path / "run"), str(tmp_path / "edit")
    walk = Walk(mmray, {"RUN": run, "EDIT": edit, "DATA": str(others), "ORG/NAME": "me/stars"})
    assert "samples   30" in walk("plan", "--model", "demo", "--data", str(images), "--limit", "30")
    assert "30 samples" in walk("census")
    assert "30" in walk("status")
    concepts = walk("rank")
    assert [re.search(rf"^\W*{word} ", concepts, re.MULTILINE) is not None for word in ("star", "rose")] == [True, True]
    assert walk("rank").startswith("star · 20 occurrences in 20 images")
    walk("properties")
    assert (tmp_path / "run" / "report.html").name in walk("report")
    assert (tmp_path / "run" / "report.html").stat().st_size > 1e6
    assert "→" in walk("edit")
    assert "reliability" in walk("evaluate")
    walk("push")
    assert walk.nexts == ['datasets.load_dataset("me/stars", "rankings")']
    for path, content in hub.files["me/stars"].items():
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / path).write_bytes(content)
    found = datasets.load_dataset(str(tmp_path / "hub"), "rankings", cache_dir=str(tmp_path / "cache"), split="train")
    assert len(found) == len(open_run(run).table("rankings"))
