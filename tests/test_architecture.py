"""The house keeps its plan: rooms have the files they need, names mean one thing, and tests stay apart."""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import pytest

import mmray
from mmray.features import FEATURES, Feature

PACKAGE = Path(mmray.__file__).parent
TESTS = Path(__file__).parent
ROOMS = sorted(file.parent for file in (PACKAGE / "features").glob("*/__init__.py"))
FORMER = frozenset(
    {
        "anew",
        "asks",
        "calm",
        "carry_out",
        "carrying",
        "checking",
        "departures",
        "driving",
        "erasing",
        "halving",
        "heard",
        "hearing",
        "instead",
        "judging",
        "lanes",
        "moving",
        "passage",
        "patience",
        "patiently",
        "proven",
        "pulling",
        "questioner",
        "recognising",
        "set_aside",
        "showing",
        "sight",
        "standing_in",
        "tail",
        "tap",
    }
)
"""Names that the glossary gave up for the field's."""
BESIDES = {"bench", "demo", "e2e", "support"}
"""Folders of tests that are no room of the package."""


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the dotted name of every module below a folder, and its syntax tree."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(parts), ast.parse(path.read_text("utf-8"))


def names_in(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module gives or uses."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, wherever it does."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{alias.name}" for alias in names)


def room_of(feature: Feature) -> Path:
    """Return the folder that a feature lies in."""
    (module, *_) = [*(job.partition(":")[0] for job in feature.jobs), feature.schemas]
    return PACKAGE.parent.joinpath(*module.split(".")).parent


def test_no_two_classes_have_one_name() -> None:
    found = defaultdict(list)
    for module, tree in trees(PACKAGE):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_modules_are_short_and_say_why() -> None:
    """Half have at most 150 lines, nine of ten at most 350; in all, three lines of a hundred have a comment."""
    texts = [path.read_text("utf-8") for path in PACKAGE.rglob("*.py")]
    # Without the __init__.py of rooms, which are a line each.
    lengths = [length for length in (text.count("\n") for text in texts) if length > 1]
    assert median(lengths) <= 150
    assert quantiles(lengths, n=10)[-1] <= 350
    tokens = [tokenize.generate_tokens(io.StringIO(text).readline) for text in texts]
    comments = sum(token.type == tokenize.COMMENT for module in tokens for token in module)
    assert comments >= 0.03 * sum(lengths)


def test_names_of_the_past_are_gone() -> None:
    found = defaultdict(set)
    for module, tree in trees(PACKAGE):
        for name in (module.rpartition(".")[2], *names_in(tree)):
            if name.strip("_").lower() in FORMER:
                found[name].add(module)
    assert found == {}


@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
def test_a_room_has_the_files_that_its_feature_needs(feature: Feature) -> None:
    needed = {
        "__init__.py": True,
        "README.md": True,
        "job.py": True,
        "command.py": not feature.settings,
        "tables.py": bool(feature.schemas),
        "report.py": bool(feature.report),
        "report.js": bool(feature.report),
        "settings.py": f"{room_of(feature).name}.settings:" in feature.settings,
    }
    room = room_of(feature)
    assert room in ROOMS
    assert [name for name, is_needed in needed.items() if is_needed and not (room / name).is_file()] == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_is_some_feature_s_and_has_tests(room: Path) -> None:
    assert room in {room_of(feature) for feature in FEATURES.values()}
    assert list((TESTS / "features" / room.name).glob("test_*.py"))


def test_tests_lie_in_the_rooms_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("*.py")} - {Path()}
    assert [str(folder) for folder in folders if str(folder) not in BESIDES and not (PACKAGE / folder).is_dir()] == []


def test_no_test_imports_another_one() -> None:
    found = []
    for module, tree in trees(TESTS):
        for name in imports_of(tree):
            parts = name.split(".")
            if parts[0] == "tests" and any(part.startswith("test_") or part == "conftest" for part in parts[1:]):
                found.append((module, name))
    assert found == []


def test_tests_import_no_private_name_of_the_package() -> None:
    imported = [(module, name) for module, tree in trees(TESTS) for name in imports_of(tree)]
    private = [(module, name) for module, name in imported if any(part.startswith("_") for part in name.split("."))]
    found = [(module, name) for module, name in private if name.startswith("mmray.")]
    # Ray lists processes by the name of their class, which the tests of kills look for.
    assert [(module, name) for module, name in found if name != "mmray.engine.ray._Actor"] == []
