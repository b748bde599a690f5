"""The six changes of CONTRIBUTING.md, each made in a copy of the package: it takes few files, and then it works."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmray.models.tiny.checkpoints import build
from mmray.models.tiny.pieces import EYES, HEADS, MISTRAL, PATCH, SIDE, WIDTH, Variant
from mmray.models.tiny.variants import LLAVA, VARIANTS
from tests.support import words
from tests.support.local_jobs import KEPT_TEXT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SAMPLES = 24


@dataclass(frozen=True)
class Change:
    """What somebody who follows a recipe does to the package."""

    most: int
    """Files that it may touch."""
    edits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """File → pattern of a place in it → text that is put there."""
    new: Mapping[str, str] = field(default_factory=dict)
    """File → what is in it."""


SCORE = Change(
    3,
    {
        "neurons/scores.py": {
            r'(?=    "random": ScoreKind)': '    "magnitude": ScoreKind("size of the contribution", LOGITS),\n'
        },
        "neurons/attribution.py": {
            r"(?=def random\()": "def magnitude(at):\n    return (at.activation * at.projection).abs()\n\n\n",
            r'(?=    "random": random,)': '    "magnitude": magnitude,\n',
        },
    },
)
EDIT_METHOD = Change(
    3,
    {
        "features/editing/edit_methods.py": {
            r'(?=    "noise": EditMethod)': '    "flip": EditMethod("rows negated", f"{_CLOSED_FORM}:flip", True),\n'
        },
        "features/editing/closed_form.py": {r"(?=def noise\()": "def flip(layer):\n    return -2 * layer.rows\n\n\n"},
    },
)
FAMILY = Change(2, {"models/families.py": {r'(?="vipllava"\), LLAVA)': '"mistral3", '}})
ROOM = "features/letters"
ANALYSIS = Change(
    8,
    {
        "features/__init__.py": {
            r'(?=        Feature\(\s*"properties",)': """
        Feature(
            "letters",
            (f"{ROOM}.letters.job:LetterJob",),
            "mmray letters RUN --text FILE",
            ("letters", "total"),
            "lines",
            schemas=f"{ROOM}.letters.tables",
            report=f"{ROOM}.letters.report:section",
            settings=f"{ROOM}.letters.job:LetterSettings",
        ),
"""
        }
    },
    {
        f"{ROOM}/__init__.py": '"""Count letters."""\n',
        f"{ROOM}/README.md": "# Letters\n",
        f"{ROOM}/job.py": Path(words.__file__).read_text("utf-8"),
        f"{ROOM}/tables.py": """
import pyarrow as pa
from mmray.runs.tables import field
TABLES = {
    "letters": pa.schema([field("letter", pa.string()), field("n", pa.int64(), "lines")]),
    "total": pa.schema([field("n", pa.int64(), "lines")]),
}
""",
        f"{ROOM}/report.py": """
from mmray.report.section import Request, Section
def section(request: Request) -> Section:
    table = request.run.optional("letters")
    return Section([] if table is None else table.to_pylist())
""",
        f"{ROOM}/report.js": """
"use strict";
const lettersPage = () => [heading("Letters", "That begin a line."), ...INDEX.letters.map((row) => h("p", row.letter))];
addPage("letters", "Letters", lettersPage, INDEX.letters.length);
""",
    },
)
COLUMN = Change(
    3,
    {
        "features/saliency/tables.py": {
            r'(?=field\("words", pa.int64)': 'field("width", pa.float64(), "of the interval"), '
        },
        "features/saliency/summary.py": {r'(?="low": found.low,)': '"width": found.high - found.low, '},
        "features/saliency/report.js": {
            r"(?<=interval\(row\[measure\], 2\))": ', " wide ", figure(row[measure].width)'
        },
    },
)
OPTION = Change(
    2,
    {
        "features/census/settings.py": {
            r'(?=    pieces: Pieces = "first")': "    min_letters: int = Field(1, ge=1)\n"
            '    """Leave out nouns of fewer letters."""\n'
        },
        "features/census/shard.py": {
            r"return (self\.nouns\.find\(.*\))\n": r"found = \1\n"
            "        return [noun for noun in found if len(noun.concept) >= self.settings.min_letters]\n"
        },
    },
)
CHANGES = {
    "score": SCORE,
    "edit method": EDIT_METHOD,
    "family": FAMILY,
    "analysis": ANALYSIS,
    "column": COLUMN,
    "option": OPTION,
}
MISTRAL_3 = Variant(
    "mistral3",
    **LLAVA
    | {
        "text": MISTRAL,
        "vision": EYES | {"model_type": "pixtral", "head_dim": WIDTH // HEADS},
        "processor": "PixtralProcessor",
        "image_processor": "PixtralImageProcessor",
        "image_settings": {"size": {"longest_edge": SIDE}, "patch_size": {"height": PATCH, "width": PATCH}},
        "options": {"image_token_index": "<image>", "spatial_merge_size": 2, "vision_feature_layer": -1},
        "processor_options": {"image_token": "<image>", "patch_size": PATCH, "spatial_merge_size": 2},
        "tokens": ("<image>", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        "template": ("", "[INST]", "<image>", "[/INST]", ""),
    },
)
Mmray = Callable[..., list[str]]
ONE_AFTER_THE_OTHER = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from mmray.cli import main
said = []
for command in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out:
        try:
            main(lambda: command)
        except SystemExit as ended:
            if ended.code:
                raise
    said.append(out.getvalue())
json.dump(said, sys.stdout)
"""
"""Runs commands in one process, because a copy of the package has to import all that it needs."""


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Mmray]:
    """Return what makes a change in a copy of the package, and returns what runs commands of that copy."""

    def make(change: Change) -> Mmray:
        package = tmp_path / "mmray"
        # With what Python has compiled of it, which holds for files of the same time and size.
        shutil.copytree(ROOT / "mmray", package, ignore=shutil.ignore_patterns("demo"))
        (package / "demo").symlink_to(ROOT / "mmray/demo")
        for name, places in change.edits.items():
            text = (package / name).read_text("utf-8")
            for place, put in places.items():
                text, count = re.subn(place, put, text)
                assert count == 1, f"{name}: {place}"
            (package / name).write_text(text, "utf-8")
        for name, text in change.new.items():
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text, "utf-8")
        return commands

    def commands(*asked: Sequence[object]) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", ONE_AFTER_THE_OTHER],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "300"},
            input=json.dumps([list(map(str, command)) for command in asked]),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said: list[str] = json.loads(done.stdout)
        return said

    return make


@pytest.fixture
def census(own_census: Callable[..., Path]) -> Path:
    return own_census(48, shard_size=24)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_takes_few_files(name: str) -> None:
    change = CHANGES[name]
    assert len(change.edits) + len(change.new) <= change.most


def test_an_analysis_takes_one_file_outside_its_folder() -> None:
    assert [name for name in (*ANALYSIS.edits, *ANALYSIS.new) if not name.startswith(ROOM)] == ["features/__init__.py"]


def test_a_score(changed: Callable[[Change], Mmray], tmp_path: Path) -> None:
    census = ("census", "--model", "demo", "--data", "demo", "--limit", 8, "--out", "run", "--local")
    told, *_ = changed(SCORE)(("census", "--help"), (*census, "--score", "magnitude"), ("report", "run"))
    assert "magnitude" in told
    scores = pq.read_table(tmp_path / "run/tables/rankings.parquet", columns=["score"])["score"].to_pylist()
    assert min(scores) >= 0
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "logits before the final norm: size of the contribution." in page


def test_an_edit_method(changed: Callable[[Change], Mmray], census: Path, tmp_path: Path) -> None:
    few = ("--neurons", 4, "--samples", 2, "--kept", 0, "--keep-text", KEPT_TEXT, "--allow-collateral")
    flip = ("edit", census, "--suppress", "broccoli", "--method", "flip", *few)
    told, done = changed(EDIT_METHOD)(("edit", "--help"), (*flip, "--out", "edit"))
    assert "flip" in told
    assert "4 neurons changed" in done
    assert (tmp_path / "edit").is_dir()


def test_a_family(changed: Callable[[Change], Mmray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mistral3", MISTRAL_3)
    (checked,) = changed(FAMILY)(("check-model", build("mistral3", tmp_path / "model"), "--json"))
    assert "multi_modal_projector.linear_2" in checked
    assert '"passed": true' in checked
    assert '"passed": false' not in checked


def test_an_analysis(changed: Callable[[Change], Mmray], census: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a\nb\nab\n")
    asked = ("letters", census, "--text", "text.txt", "--local")
    first, again, status, _ = changed(ANALYSIS)(asked, asked, ("status", census), ("report", census))
    assert first.startswith("letters: 2\n3 lines in ")
    assert "3 lines already finished" in again
    assert re.search(r"letters +3 of 3 lines +current", status)
    assert pq.read_table(census / "tables/letters.parquet").to_pydict() == {"letter": ["a", "b"], "n": [2, 1]}
    assert 'addPage("letters"' in (census / "report.html").read_text("utf-8")


def test_a_column(changed: Callable[[Change], Mmray], census: Path) -> None:
    saliency = ("saliency", census, "--images", 8, "--methods", "detector", "--draws", 10, "--local")
    changed(COLUMN)(saliency, ("report", census))
    table = pq.read_table(census / "tables/saliency.parquet")
    assert table.schema.field("width").metadata[b"unit"] == b"of the interval"
    assert min(table["width"].to_pylist()) >= 0
    page = (census / "report.html").read_text("utf-8")
    assert '" wide "' in page
    assert '"width":' in page


def test_an_option(changed: Callable[[Change], Mmray], tmp_path: Path) -> None:
    mmray = changed(OPTION)
    asked = ("census", "--model", "demo", "--data", "demo", "--limit", SAMPLES, "--out", "run", "--local")
    told, _ = mmray(("census", "--help"), (*asked, "--min-letters", 6))
    assert "Leave out nouns of fewer letters." in told
    concepts = pq.read_table(tmp_path / "run/tables/occurrences.parquet", columns=["concept"])["concept"].to_pylist()
    assert min(map(len, concepts)) >= 6
    with pytest.raises(AssertionError, match="min_letters"):
        mmray((*asked, "--min-letters", 5))
