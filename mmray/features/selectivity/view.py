"""Terminal view of an analysis of labels: neurons per label, interventions, steering and the logit lens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmray.features.selectivity.settings import TOGETHER
from mmray.models.options import MODULES
from mmray.terminal.tables import lineless

BARS = " ▁▂▃▄▅▆▇█"
TITLES = {
    "perplexity": "perplexity, held-out texts",
    "nll": "nats per token, held-out texts",
    "accuracy": "mean score of answers, held-out questions",
}
SHOWN_NEURONS, SHOWN_CAPTIONS = 5, 6


def analysis(tables: Mapping[str, pa.Table]) -> RenderableType:
    """Return the view of all tables of one analysis, or of those of all modules."""
    summary, chosen = tables["selective_labels"], tables["selectivity"]
    modules = summary["module"].unique().to_pylist()
    parts: list[RenderableType] = [labels(*(_of(module, table) for table in (summary, chosen))) for module in modules]
    if "interventions" in tables:
        rows = tables["interventions"]
        parts += own_samples(rows) if TOGETHER in rows["module"].to_pylist() else matrices(rows)
    if "steering" in tables:
        parts.append(steering(tables["steering"]))
    if "stages" in tables:
        parts.append(stages(tables["stages"]))
    return Group(*(line for part in parts for line in (part, Text())))


def labels(summary: pa.Table, neurons: pa.Table) -> Table:
    """Return one row per label: its neurons, those by chance, their stability, and their layers."""
    rows = summary.to_pylist()
    first = rows[0]
    details = f"{first['method']} · {first['module']} · {first['modality']} tokens · {first['union']:,} neurons in all"
    title = Text.assemble((f"by {first['label_kind']}", "bold"), (f" · {details}", "dim"))
    numbers = ("samples", "tokens", "neurons", "by chance", "stability")
    table = lineless("label", *numbers, "layers", left={"label", "layers"}, title=title)
    # Only this column may shrink; its texts end in an ellipsis instead of taking a second line.
    table.add_column("first")
    own: dict[str, list[str]] = defaultdict(list)
    for row in neurons.select(["label", "neuron"]).to_pylist():
        own[row["label"]].append(row["neuron"])
    for row in rows:
        table.add_row(
            Text(row["label"]),
            f"{row['samples']:,}",
            f"{row['tokens']:,}",
            f"{row['neurons']:,}",
            _number(row["chance"], 1),
            _number(row["stability"], 2),
            profile(row["layers"]),
            Text(" ".join(own[row["label"]][:SHOWN_NEURONS]), no_wrap=True, overflow="ellipsis"),
        )
    return table


def _of(module: str, table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["module"], module))


def own_samples(rows: pa.Table) -> list[RenderableType]:
    """Return, per measure, each label's own samples with its neurons of each module, and of all, zeroed."""
    own = [row for row in rows.to_pylist() if row["masked"] == row["label"]]
    modules = [module for module in (*MODULES, TOGETHER) if any(row["module"] == module for row in own)]
    parts: list[RenderableType] = []
    for measure, title in TITLES.items():
        found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for row in own:
            if row["measure"] == measure:
                found[row["label"], row["control"]][row["module"]] = row
        if not found:
            continue
        heading = Text.assemble(("own samples", "bold"), (f" · {title}", "dim"))
        table = lineless("label", "zeroed", "n", "none", *modules, left={"label", "zeroed"}, title=heading)
        for (label, control), cells in sorted(found.items(), key=lambda item: item[0][0]):
            some = next(iter(cells.values()))
            after = (_number(cells[module]["after"] if module in cells else None, 3) for module in modules)
            table.add_row(Text(label), control, f"{some['n']:,}", f"{some['before']:.3f}", *after)
        parts.append(table)
    return parts


def matrices(rows: pa.Table) -> list[RenderableType]:
    """Return, per measure, the change of every label's samples under every mask."""
    by_measure: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.to_pylist():
        by_measure[row["measure"]].append(row)
    return [_matrix(by_measure[name], title, 3) for name, title in TITLES.items() if name in by_measure]


def _matrix(rows: Sequence[Mapping[str, Any]], title: str, digits: int) -> Table:
    names = list(dict.fromkeys(row["label"] for row in rows))
    columns = ("zeroed", "control", "neurons", *names, "interval")
    heading = Text.assemble(("change", "bold"), (f" · {title} · 95 % interval of the own label", "dim"))
    table = lineless(*columns, left={"zeroed", "control"}, title=heading)
    # The first line shows the values without a mask, to which the changes refer.
    base = {row["label"]: row["before"] for row in rows}
    table.add_row("–", "", "", *(Text(f"{base[name]:.{digits}f}", "dim") for name in names), "")
    masks: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        masks[row["masked"], row["control"]][row["label"]] = row
    for (masked, control), found in masks.items():
        cells = [
            Text(f"{found[name]['change']:+.{digits}f}", "bold" if (name, control) == (masked, "selected") else "")
            for name in names
        ]
        own = found.get(masked)
        interval = f"{own['low']:+.{digits}f} to {own['high']:+.{digits}f}" if own else ""
        size = f"{next(iter(found.values()))['neurons']:,}"
        table.add_row(Text(masked), control, size, *cells, interval)
    return table


def steering(rows: pa.Table) -> RenderableType:
    """Return the fraction of captions that read like the target, and the first captions before and after."""
    found = rows.to_pylist()
    if not found:
        return Text("steering: no held-out sample of the source label", "yellow")
    first = found[0]
    turned = sum(row["label_after"] == first["target"] for row in found) / len(found)
    entirely = sum(row["words_after"] == 1.0 for row in found) / len(found)
    title = Text.assemble(
        (f"{first['source']} → {first['target']}", "bold"), (f" · {first['neurons']:,} {first['steering']}", "dim")
    )
    table = lineless(title=title)
    table.add_column("as it is")
    table.add_column("steered")
    table.add_column("reads like", no_wrap=True)
    for row in found[:SHOWN_CAPTIONS]:
        table.add_row(Text(row["before"]), Text(row["after"]), Text(row["label_after"] or "–"))
    return Group(
        table,
        Text(
            f"{turned:.0%} of {len(found):,} captions read like {first['target']}; {entirely:.0%} in every word", "bold"
        ),
    )


def stages(rows: pa.Table) -> Table:
    """Return the logit lens of the unchanged model: entropy, agreement with the last layer, and tokens per layer."""
    columns = ("layer", "image: nats", "as last", "text: nats", "as last", "image", "text")
    title = Text.assemble(("logit lens", "bold"), (" · every layer through the final norm", "dim"))
    table = lineless(*columns, left={"image", "text"}, title=title)
    layers: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows.to_pylist():
        # Lines with masks are in the report only. Those without are the same for every module.
        if row["masked"] is None:
            layers[row["layer"]][row["position"]] = row
    for layer, kinds in sorted(layers.items()):
        cells, tokens = [], []
        for kind in ("image", "text"):
            row = kinds.get(kind)
            cells += [f"{row['entropy']:.2f}", f"{row['agreement']:.0%}"] if row else ["–", "–"]
            tokens.append(Text(" ".join(row["tokens"][:5]) if row else "", no_wrap=True, overflow="ellipsis"))
        table.add_row(f"L{layer}", *cells, *tokens)
    return table


def profile(counts: Sequence[int]) -> str:
    """Return the number of neurons per layer as bars; a layer with any neuron has a visible bar."""
    most = max(counts, default=0)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] if most else BARS[0] for count in counts)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
