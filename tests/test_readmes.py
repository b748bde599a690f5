"""Every README is true to the code: links, files and tables exist, commands parse, Python names what exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import mmray
from mmray.cli import UsageError, app
from mmray.features import FEATURES
from mmray.features.saliency.model import Model
from mmray.runs.run import Run
from tests.bench.writing import between, markdown

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "jobs", "mmray", "tests")
READMES = [ROOT / "README.md", *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]
FRONT_PAGE_LINES = 150
SET_UP = (
    "    pip install -e . && mmray demo            # the whole main job on the embedded model and data",
    "    pip install -e '.[test]' && pytest         # the tests",
)
FEATURE_ROOMS = sorted(file.parent for file in (ROOT / "mmray/features").glob("*/__init__.py"))
ROOMS = [file.parent for file in READMES if file.name == "README.md" and file.parent != ROOT]
"""Folders whose README tells what the front page leaves out."""
ENTRANCES = (ROOT / "README.md", ROOT / "mmray/README.md")
"""Pages that between them lead to every room."""
SECTIONS = ("Tables", "Method", "Results", "Limits")
"""What the README of a feature tells, next to its question and its command."""

FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
FIGURES = re.compile(r"^<!-- figures: (.+) -->$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w./-]*\w\.(?:py|js)")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MEMBERS = {"mmray": mmray, "run": Run, "model": Model}
"""Name in the examples → what its attributes are looked up in."""


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name


def prose(text: str) -> str:
    """Return the text without its fenced blocks."""
    return FENCE.sub("", text)


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them; a repeated heading gets a number."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        number = found[slug] = found.get(slug, -1) + 1
        if number:
            found[f"{slug}-{number}"] = 0
    return set(found)


def broken_links(file: Path) -> Iterator[str]:
    """Yield the relative links of a page that lead nowhere: no such file, or no such heading in it."""
    for link in LINK.findall(prose(file.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in slugs(target.read_text(encoding="utf-8"))):
            yield link


def missing_files(file: Path) -> Iterator[str]:
    """Yield the scripts that a page names and that don't exist: seen from it, the top, the package, or a feature."""
    folders = (file.parent, ROOT, ROOT / "mmray", *FEATURE_ROOMS)
    for code in INLINE.findall(prose(file.read_text(encoding="utf-8"))):
        if FILE.fullmatch(code) and not any((folder / code).is_file() for folder in folders):
            yield code


def linked_from(file: Path) -> set[Path]:
    """Return the files that a page links to."""
    links = LINK.findall(file.read_text(encoding="utf-8"))
    return {(file.parent / link.partition("#")[0]).resolve() for link in links}


def shell_lines(text: str) -> Iterator[list[str]]:
    """Yield the words of every command in a page's blocks, fenced as `bash` or indented by four."""
    blocks = [block for _, language, block in FENCE.findall(text) if language == "bash"]
    for line in "\n".join([*blocks, *INDENTED.findall(prose(text))]).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            stop = words.index("&&") if "&&" in words else len(words)
            yield words[:stop]
            words = words[stop + 1 :]


def problem_of(words: list[str]) -> str | None:
    """Return what is wrong with a command, by the command line's own parser or by the files that it names."""
    match words:
        case ["mmray", "--version" | "--help"]:
            return None
        case ["mmray", name, *arguments]:
            if name not in COMMANDS:
                return f"no command {name}"
            try:
                COMMANDS[name].make_context(name, arguments)
            except UsageError as error:
                return str(error.format_message())
            return None
        case ["python", "-m", module, *options]:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                return f"no module {module}"
            return unknown_option(Path(spec.origin), options)
        case ["python", script, *options] if script.startswith("jobs/"):
            if not (ROOT / script).is_file():
                return f"no file {script}"
            missing = [word for word in options if word.startswith("jobs/") and not (ROOT / word).is_file()]
            return f"no file {missing[0]}" if missing else None
        case ["ray", "job", "submit", *rest] if "--" in rest:
            return problem_of(rest[rest.index("--") + 1 :])
    return None


def unknown_option(script: Path, words: list[str]) -> str | None:
    """Return the first option of a script's call that its source does not define, as argparse's or as typer's."""
    source = script.read_text(encoding="utf-8")
    for word in words:
        typed = f"{word.lstrip('-').replace('-', '_')}: Annotated["
        if word.startswith("--") and f'"{word}"' not in source and typed not in source:
            return f"no option {word}"
    return None


def bad_commands(text: str) -> Iterator[str]:
    """Yield the commands of a page that don't parse, with the reason; of those in running text only their names."""
    for words in shell_lines(text):
        if problem := problem_of(words):
            yield f"{shlex.join(words)}: {problem}"
    for code in INLINE.findall(prose(text)):
        words = code.split()
        if words[:1] == ["mmray"] and len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]):
            if words[1] in COMMANDS:
                known = {
                    flag for option in COMMANDS[words[1]].params for flag in (*option.opts, *option.secondary_opts)
                }
                yield from (f"{code}: no option {word}" for word in words if word[:2] == "--" and word not in known)
            else:
                yield f"{code}: no command {words[1]}"
        elif words[:2] == ["python", "-m"] and (problem := problem_of(words)):
            yield f"{code}: {problem}"


def bad_python(text: str) -> Iterator[str]:
    """Yield what is wrong with the Python blocks of a page: syntax, imports, and attributes of what mmray returns."""
    for _, language, block in FENCE.findall(text):
        if language != "python":
            continue
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            yield f"{error.msg}: {error.text}"
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names):
                    yield from (f"no module {name.name}" for name in names if not importlib.util.find_spec(name.name))
                case ast.ImportFrom(module=str(module), names=names):
                    source = importlib.import_module(module)
                    yield from (f"no {name.name} in {module}" for name in names if not hasattr(source, name.name))
                case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if owner in MEMBERS:
                    if not hasattr(MEMBERS[owner], attribute):
                        yield f"{owner} has no {attribute}"


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_every_link_of_a_readme_leads_somewhere(file):
    assert list(broken_links(file)) == []


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_every_command_of_a_readme_parses(file):
    assert list(bad_commands(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_every_python_block_of_a_readme_names_what_exists(file):
    assert list(bad_python(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_figures_between_markers_can_be_written_by_their_command(file):
    text = file.read_text(encoding="utf-8")
    for command in FIGURES.findall(text):
        assert command.endswith(" --write")
        assert problem_of(command.split()) is None
        assert "| new |" in between(text, command, "| new |\n")


def test_a_table_is_put_between_its_markers():
    page = "Before.\n\n<!-- figures: a --write -->\n\n| old |\n\n<!-- end -->\n\nAfter.\n\n<!-- end -->\n"
    table = markdown(["what", "value"], [["dogs", "\\1"]])
    assert between(page, "a --write", table) == page.replace(
        "| old |\n", "| what | value |\n|---|---|\n| dogs | \\1 |\n"
    )
    with pytest.raises(ValueError, match="no <!-- figures: b --write --> in the page"):
        between(page, "b --write", table)


def test_the_front_page_is_short_and_has_the_commands_that_set_up():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= FRONT_PAGE_LINES
    assert all(command in lines for command in SET_UP)


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_the_entrances_lead_to_every_room_s_readme(room):
    assert any(room / "README.md" in (linked_from(page) | {page}) for page in ENTRANCES)


@pytest.mark.parametrize("room", FEATURE_ROOMS, ids=name_of)
def test_a_feature_s_readme_is_complete_and_on_the_front_page(room):
    text = (room / "README.md").read_text(encoding="utf-8")
    assert room / "README.md" in linked_from(READMES[0])
    assert "**Question.**" in text
    assert any(words[0] == "mmray" for words in shell_lines(text))
    headings = re.findall(r"^#+ (\w+)", prose(text), re.MULTILINE)
    assert [section for section in SECTIONS if section not in headings] == []


@pytest.mark.parametrize("feature", [feature for feature in FEATURES.values() if feature.schemas], ids=lambda f: f.name)
def test_a_feature_s_readme_has_a_line_for_each_of_its_tables(feature):
    text = (ROOT / Path(*feature.schemas.split(".")).parent / "README.md").read_text(encoding="utf-8")
    assert [table for table in feature.tables if f"\n| `{table}` |" not in text] == []


def test_the_package_s_readme_has_the_layers_of_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    lines = re.findall(
        r"^\d+\. (.+)", (ROOT / "mmray/README.md").read_text("utf-8").split("## Layers")[1], re.MULTILINE
    )
    told = [{name.removesuffix(".py").rpartition("/")[2] for name in INLINE.findall(line)} for line in lines]
    assert told[: len(layers)] == [set(re.findall(r"\w+(?=[ )]|$)", layer)) for layer in layers]


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_every_script_that_a_readme_names_exists(file):
    assert list(missing_files(file)) == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_shown_in_a_readme(command):
    shown = [words[1] for file in READMES for words in shell_lines(file.read_text("utf-8")) if words[:1] == ["mmray"]]
    assert command in shown


def test_the_picture_of_the_report_is_small():
    picture = ROOT / "mmray/report/report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size <= 150_000


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("[a](other.md#words)", False),
        ("[a](#here-to-stay-1)", False),
        ("[a](https://example.org/nowhere)", False),
        ("[a](missing.md)", True),
        ("![a](missing.png)", True),
        ("[a](other.md#no-such-heading)", True),
        ("[a](#no-such-heading)", True),
    ],
)
def test_a_broken_link_is_found(tmp_path, link, broken):
    (tmp_path / "other.md").write_text("# Words\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Here, to stay\n\n## Here to stay\n\n{link}\n\n```text\n[a](in a block, no link.md)\n```\n")
    assert list(broken_links(page)) == [link.partition("(")[2].rstrip(")")] * broken


@pytest.mark.parametrize("name", ["gone.py", "mmray/gone.py", "gone/report.js"])
def test_a_script_that_does_not_exist_is_found(tmp_path, name):
    (tmp_path / "here.py").touch()
    page = tmp_path / "page.md"
    page.write_text(f"`here.py`, `mmray/api.py`, `{name}`, but not `a.parquet`, nor:\n\n```text\n`no.py`\n```\n")
    assert list(missing_files(page)) == [name]


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nmmray censuss --model demo\n```",
        "```bash\nmmray census --model demo --data demo --out runs/demo --no-such-option 3\n```",
        "```bash\nmmray census --model demo --data demo\n```",
        "```bash\nmmray rank runs/demo --k many\n```",
        "```bash\nmmray properties runs/demo && mmray reportt runs/demo\n```",
        "    mmray demo --quickly\n",
        "```bash\npython -m tests.bench.no_such_bench\n```",
        "```bash\npython -m tests.bench.properties --no-such-option\n```",
        "```bash\npython jobs/census.py --config jobs/configs/missing.yaml\n```",
        "```bash\nray job submit --working-dir . -- python jobs/missing.py\n```",
        "Call `mmray censuss RUN`.",
        "Call `mmray rank RUN --sideways`.",
        "Call `python -m tests.bench.no_such_bench`.",
    ],
)
def test_a_command_that_does_not_parse_is_found(text):
    assert len(list(bad_commands(text))) == 1


@pytest.mark.parametrize(
    "block",
    ["run =", "import mmrays", "from mmray import no_such_name", "mmray.no_such_name()", "run.no_such_method('dog')"],
)
def test_python_that_does_not_hold_is_found(block):
    assert len(list(bad_python(f"```python\n{block}\n```\n"))) == 1
