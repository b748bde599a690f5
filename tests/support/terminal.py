"""What a terminal shows."""

import io

from rich.console import Console, RenderableType


def shown(renderable: RenderableType, width: int) -> list[str]:
    """Return the lines of something shown in a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return lines
