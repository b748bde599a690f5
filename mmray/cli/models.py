"""Models, before anything is run on them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from mmray.errors import InputError
from mmray.features.census.settings import CensusSettings
from mmray.models.options import Dtype
from mmray.terminal.options import AsJson, app, console, help_of, option


@app.command("check-model")
def check_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=help_of("model", CensusSettings))],
    dtype: Annotated[Dtype, option("dtype", CensusSettings)] = "auto",
    trust_remote_code: Annotated[bool, option("trust_remote_code", CensusSettings)] = False,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a model were found, and prove them: exit status 2 names a claim that fails."""
    from mmray.cli.model_tree import claims, parts_tree
    from mmray.features.census.model_check import check_model as prove
    from mmray.models.loading import load

    loaded = load(model, dtype, trust_remote_code=trust_remote_code)
    checks = prove(loaded)
    parts = loaded.parts
    modules = {name: list(parts.of(name)) for name in ("language", "vision", "projector")}
    if as_json:
        print(
            json.dumps({"parts": asdict(parts), "checks": [asdict(check) for check in checks], "unused": loaded.unused})
        )
    else:
        title = f"[bold]{escape(model)}[/] [dim]· family {parts.family}[/]"
        console.print(parts_tree(title, modules, parts.final_norm, parts.unembedding, parts.image))
        console.print(claims(checks))
        if loaded.unused:
            named = ", ".join(loaded.unused[:3]) + (", …" if len(loaded.unused) > 3 else "")
            several = len(loaded.unused) > 1
            console.print(
                f"{len(loaded.unused)} {'weights' if several else 'weight'} of the checkpoint "
                f"{'are' if several else 'is'} not used: {escape(named)}"
            )
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise InputError(f"{model}: not proven: {'; '.join(failed)}")
