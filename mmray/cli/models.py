"""The command `mmray check-model`: the parts found in a model as a tree, and the checks that prove them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from mmray.errors import InputError
from mmray.features.census.settings import CensusSettings
from mmray.models.options import Dtype
from mmray.terminal.options import AsJson, app, command_line, console, help_of, option, plural, say, say_next

if TYPE_CHECKING:
    from mmray.features.census.model_check import Ability
    from mmray.features.census.support_matrix import Support
    from mmray.models.layout import ModelParts, Projection
    from mmray.neurons.validation import Check

MODULES = ("language", "vision", "projector")


@app.command(
    "check-model",
    group="Models",
    examples=(
        "mmray check-model llava-hf/llava-1.5-7b-hf",
        "mmray check-model ./checkpoint --json",
        "mmray check-model --all",
    ),
)
def check_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=help_of("model", CensusSettings))] = "",
    every: Annotated[bool, typer.Option("--all", help="Every model type known, as a tiny random checkpoint.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="README", help="With --all: the page to write the tables of types into.")
    ] = None,
    dtype: Annotated[Dtype, option("dtype", CensusSettings)] = "auto",
    trust_remote_code: Annotated[bool, option("trust_remote_code", CensusSettings)] = False,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a model were found, and prove them."""
    if not model and not every:
        raise InputError("Missing argument 'MODEL' or '--all'; see mmray check-model --help")
    if every and model:
        raise InputError("give MODEL or --all, not both")
    if write and not every:
        raise InputError("--write needs --all: mmray check-model --all --write README.md")
    if every:
        _check_all(dtype, write, as_json=as_json)
        return
    from mmray.features.census.model_check import abilities_of
    from mmray.features.census.model_check import check_model as prove
    from mmray.models.loading import load

    loaded = load(model, dtype, trust_remote_code=trust_remote_code)
    checks = prove(loaded)
    failed = [check.name for check in checks if not check.passed]
    # Of a model that is not understood, nothing else is worth saying.
    abilities = [] if failed else abilities_of(loaded)
    parts = loaded.parts
    if as_json:
        rows = {"checks": [asdict(check) for check in checks], "abilities": [asdict(one) for one in abilities]}
        print(json.dumps({"parts": asdict(parts), **rows, "unused": loaded.unused}))
    else:
        title = f"[bold]{escape(model)}[/] [dim]· family {parts.family}[/]"
        console.print(_parts_tree(title, parts))
        console.print(_check_lines(checks))
        if abilities:
            console.print(_ability_lines(abilities))
        if loaded.unused:
            names = ", ".join(loaded.unused[:3]) + (", …" if len(loaded.unused) > 3 else "")
            verb = "are" if len(loaded.unused) > 1 else "is"
            console.print(f"{plural(len(loaded.unused), 'weight')} of the checkpoint {verb} not used: {escape(names)}")
    if failed:
        raise InputError(f"{model}: not proven: {'; '.join(failed)}")
    if not as_json:
        say_next(command_line("plan", "--model", model, "--data", "DATA"))


def _check_all(dtype: Dtype, write: Path | None, *, as_json: bool) -> None:
    """Prove every model type, print a line for each, and write the tables into a README if one is given."""
    from mmray.features.census.support_matrix import page_for_tables, prove_all, tables, written
    from mmray.models.tiny.catalogue import CATALOGUE, WITHOUT, untried

    page = None if write is None else page_for_tables(write)
    lacking = {name: tiny.lacks for name, tiny in CATALOGUE.items() if tiny.lacks}
    if page is not None and lacking:
        raise InputError(f"{write}: would lose types that need {', '.join(sorted({*lacking.values()}))}: install it")
    names = [name for name in CATALOGUE if name not in lacking]
    found = []
    for one in prove_all(names, dtype):
        found.append(one)
        if not as_json:
            console.print(_type_line(one, max(map(len, names))), soft_wrap=True)
    failed = [one.name for one in found if not one.passed]
    if as_json:
        rows = [asdict(one) | {"passed": one.passed} for one in found]
        print(json.dumps({"types": rows, "lacking": lacking, "unsupported": WITHOUT, "untried": untried()}))
    else:
        for name, library in lacking.items():
            console.print(Text(f"– {name}: not tried: {library} is not installed", "dim"), soft_wrap=True)
        images = sum(one.passed and one.image != "none" for one in found)
        texts = sum(one.passed and one.image == "none" for one in found)
        say(f"{images} types that take images and {texts} text-only ones passed; {len(failed)} did not")
    if failed:
        raise InputError(f"not proven: {', '.join(failed)}")
    if write is not None and page is not None:
        write.write_text(written(page, tables(found)), encoding="utf-8")
    if not as_json:
        say_next(command_line("check-model", "MODEL"))


def _type_line(one: Support, width: int) -> Text:
    """Return the line of a type: its MLPs, how they were found, how many checks hold, and what doesn't work."""
    mark = Text("✓ ", "green") if one.passed else Text("✗ ", "bold red")
    line = mark.append(one.name.ljust(width), "")
    if one.problem:
        return line.append(f"  {one.problem}", "red")
    line.append(f"  {one.found_by}  {one.mlp:<7}  {one.image:<15}  {one.held}", "dim")
    if one.passed:
        return line.append(f"  without {one.missing}" if one.missing != "–" else "", "dim")
    return line.append(f"  {'; '.join(check.detail for check in one.checks if not check.passed)}", "red")


def _parts_tree(title: str, parts: ModelParts) -> Tree:
    """Return a model's MLPs by module, its final norm and unembedding, and how the image enters."""
    tree = Tree(Text.from_markup(title), guide_style="dim")
    for module in MODULES:
        projections = list(parts.of(module))
        if not projections:
            tree.add(Text(f"{module}: no MLP", "dim"))
            continue
        neurons = sum(projection.width for projection in projections)
        branch = tree.add(f"{module}: {plural(len(projections), 'MLP')}, {neurons:,} neurons")
        branch.add(_projection_line(projections[0]))
        if len(projections) > 1:
            branch.add(Text(f"… {projections[-1].path}", "dim"))
    tree.add(f"final norm: {parts.final_norm}")
    tree.add(f"unembedding: {parts.unembedding}")
    tree.add(f"image: {parts.image}")
    return tree


def _projection_line(projection: Projection) -> Text:
    gate = f"gate {projection.gate.rpartition('.')[2]}" if projection.gate else "no gate"
    shared = " and a shared one" if projection.shared else ""
    kind = f"{projection.experts} experts{shared}" if projection.experts else gate
    return Text(projection.path).append(f"  {projection.width:,} neurons, {kind}", "dim")


def _check_lines(checks: Iterable[Check]) -> RenderableType:
    lines = []
    for check in checks:
        mark = Text("✓ ", "green") if check.passed else Text("✗ ", "bold red")
        lines.append(mark.append(check.name, "").append(f"  {check.detail}", "dim" if check.passed else "red"))
    return Group(*lines)


def _ability_lines(abilities: Iterable[Ability]) -> RenderableType:
    works = [one.name for one in abilities if not one.problem]
    lines = [Text("works: ").append(" · ".join(works) or "nothing further")]
    lines += [Text(f"– {one.name}").append(f"  {one.problem}", "dim") for one in abilities if one.problem]
    return Group(*lines)
