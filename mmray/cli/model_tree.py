"""A model's parts as a tree, and the claims about them with what proves each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree


class ProjectionRow(Protocol):
    """One MLP output projection."""

    @property
    def path(self) -> str:
        """Module path."""

    @property
    def gate(self) -> str | None:
        """Path of the gate's Linear."""

    @property
    def width(self) -> int:
        """Neurons."""

    @property
    def experts(self) -> int:
        """Fused experts; 0 for an ordinary MLP."""


class Claim(Protocol):
    """Something said of a model, whether it holds, and the figure that says so."""

    @property
    def name(self) -> str:
        """What is claimed."""

    @property
    def passed(self) -> bool:
        """Whether it holds."""

    @property
    def detail(self) -> str:
        """The figure."""


def parts_tree(
    title: str, modules: Mapping[str, Sequence[ProjectionRow]], final_norm: str, unembedding: str, image: str
) -> Tree:
    """Return the parts: MLPs by module, final norm, unembedding, and how the image enters."""
    tree = Tree(Text.from_markup(title), guide_style="dim")
    for module, projections in modules.items():
        if not projections:
            tree.add(Text(f"{module}: no MLP", "dim"))
            continue
        neurons = sum(projection.width for projection in projections)
        branch = tree.add(f"{module}: {len(projections)} MLPs, {neurons:,} neurons")
        branch.add(_path(projections[0]))
        if len(projections) > 1:
            branch.add(Text(f"… {projections[-1].path}", "dim"))
    tree.add(f"final norm: {final_norm}")
    tree.add(f"unembedding: {unembedding}")
    tree.add(f"image: {image}")
    return tree


def claims(checks: Iterable[Claim]) -> RenderableType:
    """Return a line a claim."""
    lines = []
    for check in checks:
        mark = Text("✓ ", "green") if check.passed else Text("✗ ", "bold red")
        lines.append(mark.append(check.name, "").append(f"  {check.detail}", "dim" if check.passed else "red"))
    return Group(*lines)


def _path(projection: ProjectionRow) -> Text:
    gated = f"gate {projection.gate.rpartition('.')[2]}" if projection.gate else "no gate"
    kind = f"{projection.experts} experts" if projection.experts else gated
    return Text(projection.path).append(f"  {projection.width:,} neurons, {kind}", "dim")
