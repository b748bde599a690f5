"""What a run looks like in the terminal: rankings, neurons, status and summaries as rich renderables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmray.features.census.drift import Drift
from mmray.features.census.plan import CensusEstimate
from mmray.neurons.scores import unit_of
from mmray.runs.lease import Driver
from mmray.runs.receipts import AROUND, Cost
from mmray.runs.run import CERTIFICATES, ORDERS, Reason, Run, Status, reasons
from mmray.runs.status import AnalysisStatus

SHOWN_TOKENS = 6
NEGATIVE = "−"
"""Marks a neuron whose activation is negative at the concept: it writes what its row of W_out suppresses."""
SHOWN_REASONS, SHOWN_SOURCES = 10, 3


def tokens_text(tokens: Sequence[str], concept: str = "", limit: int = SHOWN_TOKENS, *, negative: bool = False) -> Text:
    """Return a neuron's tokens in one line, those that begin the concept in bold."""
    text = Text(f"{NEGATIVE} " if negative else "", no_wrap=True, overflow="ellipsis")
    for token in tokens[:limit]:
        own = bool(concept) and len(token) > 1 and concept.startswith(token.casefold())
        text.append(token, "bold green" if own else "")
        text.append("  ")
    return text


def ranking(rows: pa.Table, title: Text, by: str = "score") -> Table:
    """Return a concept's ranking as a table; the second number is `selective` where it is ordered by that.

    A rank that is not certified in this order is marked `?`; there are no certificates by share.
    """
    second = "selective" if by == "selective" else "specific"
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for name in ("rank", "neuron", "score", second, "share"):
        table.add_column(name, justify="left" if name == "neuron" else "right", no_wrap=True)
    # Only this column may shrink; its texts end in an ellipsis instead of taking a second line.
    table.add_column(f"writes ({NEGATIVE}: by negative activation)")
    column, certificate = ORDERS[by][0], CERTIFICATES.get(by, "")
    for place, row in enumerate(rows.to_pylist(), 1):
        # A run of an earlier version has certificates by score alone.
        doubtful = row.get(certificate) is False
        rank = f"{place if by == 'share' else row[column]}{'?' * doubtful}"
        numbers = (f"{row['score']:.3f}", f"{row[second]:.3f}", f"{row['share']:.0%}")
        written = tokens_text(row["tokens"], row["concept"], negative=row["activation"] < 0)
        table.add_row(rank, row["neuron"], *numbers, written)
    return table


def concept_list(rows: pa.Table, of: int) -> RenderableType:
    """Return concepts as a table; `of`: the number that the run has."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("concept", "occurrences", "images", "highest neuron"):
        table.add_column(name, justify="right" if name in ("occurrences", "images") else "left", no_wrap=True)
    for row in rows.to_pylist():
        table.add_row(Text(row["concept"]), f"{row['occurrences']:,}", f"{row['images']:,}", row["neuron"] or "")
    rest = [Text(f"and {of - len(rows):,} more", "dim")] if of > len(rows) else []
    return Group(table, *rest)


def concept_title(run: Run, concept: str) -> Text:
    """Return the line above a concept's ranking."""
    settings = run.info["settings"]
    unit = unit_of(settings["score"], folded=settings["fold_norm"])
    n = run.concepts[concept.casefold()]
    images = run.images(concept)
    where = f" in {images:,} image{'s' * (images > 1)}" if images else ""
    facts = f" · {n:,} occurrence{'s' * (n > 1)}{where} · {settings['score']}" + (f" in {unit}" if unit else "")
    # Else it would be wrapped where a table of few rows ends.
    return Text.assemble((concept.casefold(), "bold"), (facts, "dim"), no_wrap=True, overflow="ignore")


def neuron(facts: dict[str, Any]) -> RenderableType:
    """Return what is known of a neuron."""
    active = facts["n_active"] / max(facts["n_tokens"], 1)
    lines: list[RenderableType] = [
        Text(facts["neuron"], "bold"),
        # What it adds to the stream is activation × row: each sign has its own words.
        Text("writes +    ").append_text(tokens_text(facts["tokens"], limit=10)),
        Text(f"writes {NEGATIVE}    ").append_text(tokens_text(facts["suppressed"], limit=10)),
        Text(
            f"activation  mean {facts['mean']:.3f}, std {facts['std']:.3f}, {facts['min']:.2f} to {facts['max']:.2f}; "
            f"open at {active:.1%} of {facts['n_tokens']:,} tokens"
        ),
    ]
    if facts["concepts"]:
        shown = ", ".join(
            f"{NEGATIVE + ' ' if row['activation'] < 0 else ''}{row['concept']} (#{row['rank']}, {row['score']:.2f})"
            for row in facts["concepts"][:8]
        )
        more = len(facts["concepts"]) - 8
        lines.append(Text(f"concepts    {shown}" + (f" and {more} more" if more > 0 else "")))
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "activation", "position", "sample"):
        table.add_column(name, justify="right" if name in ("activation", "position") else "left", no_wrap=True)
    table.columns[-1].max_width = 24
    table.add_column("caption")
    for row in facts["examples"]:
        side = "highest" if row["sign"] > 0 else "lowest"
        place = str(row["position"])
        # As texts, not as markup: a caption may have brackets.
        table.add_row(side, f"{row['activation']:.2f}", place, Text(row["sample_id"]), Text(row["caption"] or ""))
    return Group(*lines, Text(), table)


def status(status: Status, failures: Iterable[dict[str, Any]], uri: str) -> RenderableType:
    """Return how far a run is."""
    state = "finished" if status.finished and not status.pending else "not finished: run mmray census again to go on"
    lines: list[RenderableType] = [
        Text.assemble((uri, "bold"), (f" · {state}", "dim")),
        Text(
            f"shards    {status.shards_done} done, {status.pending} pending, {len(status.quarantined)} quarantined "
            f"of {status.shards}"
        ),
        Text(
            f"samples   {status.samples_done:,} of {status.samples:,}, "
            f"{status.samples_per_second:.1f} a second and worker, {status.failures:,} failed"
        ),
    ]
    if status.certified is not None:
        lines.append(
            Text(
                f"ranks     {status.certified:.0%} of the ten highest by score certified, of concepts with 5 or more "
                "occurrences"
            )
        )
    if status.driver is not None:
        lines.append(Text(f"driver    {_driver(status.driver)}"))
    if spent := spending(status.cost):
        lines.append(Text(f"time      {spent}"))
    lines += [Text(f"skipped   {line}") for line in skipped(status.skipped, status.samples_done)]
    lines += [Text(f"shard {number} quarantined: {reason}", "red") for number, reason in status.quarantined.items()]
    found = reasons(failures)
    lines += [Text(_reason(reason), "yellow") for reason in found[:SHOWN_REASONS]]
    if rest := found[SHOWN_REASONS:]:
        failed = sum(len(reason.sources) for reason in rest)
        lines.append(Text(f"and {failed:,} more for {len(rest):,} other reasons: see the table errors", "yellow"))
    return Group(*lines)


def spending(cost: Cost) -> str:
    """Return where workers' time and memory went, the longest phase first; empty where receipts don't tell."""
    whole = cost.seconds + sum(cost.phases.get(name, 0.0) for name in AROUND)
    phases = {name: seconds / whole for name, seconds in cost.phases.items()} if whole else {}
    told = {name: share for name, share in phases.items() if share >= 0.01}
    rest = {"other": 1 - sum(told.values())} if sum(told.values()) <= 0.99 else {}
    shares = [f"{name} {share:.0%}" for name, share in (told | rest).items()]
    held = [f"{size / 1e9:.1f} GB of {where} memory" for where, size in cost.memory.items()]
    spent = [f"{', '.join(shares)} of {whole:,.0f} s"] if phases else []
    return "; ".join(spent + ([f"at most {' and '.join(held)} per worker"] if held else []))


def analyses(found: Sequence[AnalysisStatus]) -> RenderableType:
    """Return how far each analysis is: a row each, then what is to be said or done about it."""
    shown = [one for one in found if not one.at_rest]
    counts: dict[str, list[int]] = {
        "pending": [one.pending for one in shown],
        "quarantined": [len(one.quarantined) for one in shown],
        "failed": [one.failures for one in shown],
    }
    # What is zero everywhere needs no column.
    told = {name: numbers for name, numbers in counts.items() if any(numbers)}
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("analysis", "done", *told, "tables"):
        table.add_column(name, justify="left" if name in ("analysis", "tables") else "right", no_wrap=True)
    for row, one in enumerate(shown):
        numbers = [_units(numbers[row]) if name != "failed" else f"{numbers[row]:,}" for name, numbers in told.items()]
        done = f"{one.size_done:,} of {one.size:,} {one.noun}"
        state = Text(one.tables, "" if one.tables in ("", "current") else "yellow")
        table.add_row(Text(one.title), done, *numbers, state)
    lines: list[RenderableType] = [
        Text(f"{one.title}: {line}", style) for one in shown for line, style in _remarks(one)
    ]
    if rest := len(found) - len(shown):
        lines.append(Text(f"and {rest:,} finished with other settings", "dim"))
    return Group(Text(), table, *lines)


def _units(count: int) -> str:
    return f"{count:,} unit{'s' * (count != 1)}" if count else "0"


def _driver(driver: Driver) -> str:
    if driver.state == "at work":
        return f"at work: process {driver.pid} on {driver.host}"
    return f"{driver.state} {datetime.fromtimestamp(driver.seen):%Y-%m-%d %H:%M}"


def _remarks(one: AnalysisStatus) -> Iterator[tuple[str, str]]:
    """Yield what is to be said of an analysis, each line with its style."""
    facts = [f"{one.rate:.2g} {one.noun}/s per worker"] if one.rate else []
    facts += [spent] if (spent := spending(one.cost)) else []
    facts += [f"driver {_driver(one.driver)}"] if one.driver is not None else []
    if facts:
        yield "; ".join(facts), "dim"
    yield from ((line, "") for line in skipped(one.skipped, one.size_done))
    yield from ((f"unit {number} quarantined: {reason}", "red") for number, reason in one.quarantined.items())
    yield from ((line, "red") for line in one.damage)
    if one.at_work:
        return
    if one.pending:
        yield f"not finished; resume with: {one.renew}", "yellow"
    elif one.tables not in ("", "current"):
        yield f"tables {one.tables}; renew them: {one.renew}", "yellow"


def skipped(counts: Mapping[str, int], samples: int) -> list[str]:
    """Return a line per reason for which samples were skipped."""
    return [
        f"{count:,} of {samples:,} captions {'has' if count == 1 else 'have'} {reason}"
        for reason, count in counts.items()
    ]


def _reason(reason: Reason) -> str:
    shown, more = reason.sources[:SHOWN_SOURCES], len(reason.sources) - SHOWN_SOURCES
    where = ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
    count = f"{len(reason.sources):,} × " if len(reason.sources) > 1 else ""
    return f"{count}{reason.stage}: {where}: {reason.message}"


def drift(drift: Drift, rows: int = 8) -> RenderableType:
    """Return how two runs differ: the concepts least alike, and the neurons whose activity has shifted most."""
    model = "the same model" if drift.same_model else "another model"
    changed = len(drift.concepts) - drift.unchanged
    mean = f"mean over {changed:,} concept{'s' * (changed != 1)}"
    lines: list[RenderableType] = [
        Text.assemble(
            (f"drift {drift.drift:.3f}", "bold"),
            (f" · {mean}, their {drift.k} highest by {drift.by} · {model}", "dim"),
        ),
        Text(f"concepts  {len(drift.concepts):,} in both, {drift.unchanged:,} without new occurrences"),
    ]
    for title, names in (("new", drift.new), ("vanished", drift.vanished)):
        if names:
            more = f" and {len(names) - rows:,} more" if len(names) > rows else ""
            lines.append(Text(f"{title:9s} {', '.join(names[:rows])}{more}"))
    concepts = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("concept", "overlap", f"Jaccard@{drift.k}", "Spearman", "occurrences"):
        concepts.add_column(name, justify="left" if name == "concept" else "right", no_wrap=True)
    for row in drift.concepts.slice(0, min(rows, changed)).to_pylist():
        correlation = "" if row["spearman"] is None else f"{row['spearman']:.3f}"
        counts = f"{row['n_before']:,} → {row['n_after']:,}"
        concepts.add_row(Text(row["concept"]), f"{row['overlap']:.3f}", f"{row['jaccard']:.3f}", correlation, counts)
    neurons = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("neuron", "shift in std", "mean", "active"):
        neurons.add_column(name, justify="left" if name == "neuron" else "right", no_wrap=True)
    for row in drift.neurons.slice(0, rows).to_pylist():
        mean = f"{row['mean_before']:.3f} → {row['mean_after']:.3f}"
        active = f"{row['active_before']:.1%} → {row['active_after']:.1%}"
        neurons.add_row(row["neuron"], f"{row['shift']:+.3f}", mean, active)
    return Group(*lines, Text(), concepts, Text(), neurons)


def summary(run: Run, concepts: Sequence[str], k: int = 4) -> RenderableType:
    """Return the finding in short: these concepts with their highest neurons."""
    parts: list[RenderableType] = []
    for concept in concepts:
        parts += [ranking(run.rank(concept, k), concept_title(run, concept)), Text()]
    return Group(*parts)


def plan(plan: CensusEstimate) -> RenderableType:
    """Return what a census would cost, and what it would read."""
    duration = f"{plan.hours:.1f} hours" if plan.hours >= 1 else f"{plan.hours * 60:.1f} minutes"
    seen = plan.sample
    languages = ", ".join(f"{language} {count}" for language, count in seen.languages.items()) or "none"
    nouns = ", ".join(f"{noun} {count}" for noun, count in seen.frequent) or "none"
    kept = (
        f"kept      {plan.kept:,} of {plan.neurons:,} neurons per concept and shard; with many shards few ranks are "
        "certified, and more --candidates certify more"
    )
    return Group(
        Text(f"samples   {plan.samples:,}, about {plan.positions:.0f} tokens and {plan.occurrences:.1f} nouns each"),
        Text(f"shards    {plan.shards:,}"),
        Text(
            f"time      {duration} with {plan.workers} worker{'s' * (plan.workers > 1)} like this machine "
            f"({plan.teraflops:,.0f} TFLOP at {plan.speed:.2g} TFLOP/s)"
        ),
        Text(f"bytes     about {plan.bytes_written / 1e9:.2g} GB written to the run"),
        Text(
            f"looked at {seen.rows} rows: {seen.unreadable} unreadable, {seen.without_nouns} without a noun; "
            f"{'languages as guessed' if seen.guessed else 'languages'}: {languages}"
        ),
        Text(f"nouns     by {seen.source}: {nouns}"),
        *(Text(f"warning   {line}", "yellow") for line in seen.warnings),
        *([Text(kept)] if plan.kept < plan.neurons else []),
    )
