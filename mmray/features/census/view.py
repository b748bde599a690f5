"""Terminal views of a run as rich renderables: rankings, neurons, status, drift and cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mmray.features.census.cost import CensusEstimate
from mmray.features.census.drift import Drift
from mmray.neurons.scores import unit_of
from mmray.runs.concepts import ORDERS
from mmray.runs.failures import Reason, reasons
from mmray.runs.lease import Driver
from mmray.runs.receipts import AROUND, Cost
from mmray.runs.run import CERTIFICATES, Run, Status
from mmray.runs.status import AnalysisStatus
from mmray.terminal.progress import rate
from mmray.terminal.tables import lineless

SHOWN_TOKENS = 6
NEGATIVE = "−"
"""Marks a neuron with negative activation at the concept: it writes the tokens that its row of W_out suppresses."""
SHOWN_CONCEPTS, SHOWN_REASONS, SHOWN_SOURCES = 8, 10, 3


def tokens_text(tokens: Sequence[str], concept: str = "", limit: int = SHOWN_TOKENS, *, negative: bool = False) -> Text:
    """Return a neuron's tokens in one line, with tokens that begin the concept in bold."""
    text = Text(f"{NEGATIVE} " if negative else "", no_wrap=True, overflow="ellipsis")
    for token in tokens[:limit]:
        own = bool(concept) and len(token) > 1 and concept.startswith(token.casefold())
        text.append(token, "bold green" if own else "")
        text.append("  ")
    return text


def ranking(rows: pa.Table, title: Text, by: str = "score") -> Table:
    """Return a concept's ranking as a table. Its second number is `selective` if ordered by that, else `specific`.

    A rank that is not certified in this order is marked `?`. There are no certificates by share.
    """
    second = "selective" if by == "selective" else "specific"
    table = lineless("rank", "neuron", "score", second, "share", left={"neuron"}, title=title)
    # Only this column may shrink; its texts end in an ellipsis instead of taking a second line.
    table.add_column(f"writes ({NEGATIVE}: by negative activation)")
    column, certificate = ORDERS[by][0], CERTIFICATES.get(by, "")
    for number, row in enumerate(rows.to_pylist(), 1):
        # Runs of earlier versions have certificates by score alone.
        uncertain = row.get(certificate) is False
        # The table `rankings` has no rank by share.
        rank = f"{number if by == 'share' else row[column]}{'?' * uncertain}"
        numbers = (f"{row['score']:.3f}", f"{row[second]:.3f}", f"{row['share']:.0%}")
        tokens = tokens_text(row["tokens"], row["concept"], negative=row["activation"] < 0)
        table.add_row(rank, row["neuron"], *numbers, tokens)
    return table


def concept_list(rows: pa.Table, of: int) -> RenderableType:
    """Return concepts as a table; `of` is the number of concepts in the run."""
    columns = [
        ["concept", *rows["concept"].to_pylist()],
        ["occurrences", *(f"{count:,}" for count in rows["occurrences"].to_pylist())],
        # Runs of earlier versions did not count images.
        ["images", *("" if count is None else f"{count:,}" for count in rows["images"].to_pylist())],
        ["highest neuron", *(name or "" for name in rows["neuron"].to_pylist())],
    ]
    rest = [Text(f"and {of - len(rows):,} more", "dim")] if of > len(rows) else []
    return Group(_LongTable(columns, left={"concept", "highest neuron"}), *rest)


@dataclass(frozen=True)
class _LongTable:
    """A table that looks like a `lineless` one and never wraps; rich's own takes seconds for ten thousand rows."""

    columns: Sequence[Sequence[str]]
    """Each with its head first."""
    left: Collection[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        padded = []
        for column in self.columns:
            widths = list(map(cell_len, column))
            longest = max(widths)
            spaces = [" " * (longest - width) for width in widths]
            pairs = zip(column, spaces, strict=True)
            padded.append([cell + space if column[0] in self.left else space + cell for cell, space in pairs])
        for number, cells in enumerate(zip(*padded, strict=True)):
            yield Segment("  ".join(cells).rstrip() + "\n", None if number else console.get_style("dim"))


def concept_title(run: Run, rows: pa.Table) -> Text:
    """Return the line above a concept's ranking, given some of its rows."""
    settings = run.info["settings"]
    unit = unit_of(settings["score"], folded=settings["fold_norm"])
    first = rows.slice(0, 1).to_pylist()[0]
    n, images = first["n"], first["n_images"]
    where = f" in {images:,} image{'s' * (images > 1)}" if images else ""
    details = f" · {n:,} occurrence{'s' * (n > 1)}{where} · {settings['score']}" + (f" in {unit}" if unit else "")
    # Otherwise rich would wrap it to the width of a narrow table.
    return Text.assemble((first["concept"], "bold"), (details, "dim"), no_wrap=True, overflow="ignore")


def neuron(found: dict[str, Any]) -> RenderableType:
    """Return the view of a neuron, given `Run.neuron`."""
    active = found["n_active"] / max(found["n_tokens"], 1)
    lines: list[RenderableType] = [
        Text(found["neuron"], "bold"),
        # A neuron adds activation × row to the residual stream, so each sign of the activation has its own words.
        Text("writes +    ").append_text(tokens_text(found["tokens"], limit=10)),
        Text(f"writes {NEGATIVE}    ").append_text(tokens_text(found["suppressed"], limit=10)),
        Text(
            f"activation  mean {found['mean']:.3f}, std {found['std']:.3f}, {found['min']:.2f} to {found['max']:.2f}; "
            f"open at {active:.1%} of {found['n_tokens']:,} tokens"
        ),
    ]
    if found["concepts"]:
        shown = ", ".join(
            f"{NEGATIVE + ' ' if row['activation'] < 0 else ''}{row['concept']} (#{row['rank']}, {row['score']:.2f})"
            for row in found["concepts"][:SHOWN_CONCEPTS]
        )
        more = len(found["concepts"]) - SHOWN_CONCEPTS
        lines.append(Text(f"concepts    {shown}" + (f" and {more} more" if more > 0 else "")))
    table = lineless("", "activation", "token", "sample", left={"", "token", "sample"})
    # Sample ids may be long paths; captions matter more.
    table.columns[-1].max_width = 24
    table.add_column("caption")
    for row in found["examples"]:
        side = "highest" if row["sign"] > 0 else "lowest"
        # As Text because rich would read brackets in a caption as markup.
        texts = map(Text, (_token(row), row["sample_id"], row["caption"] or ""))
        table.add_row(side, f"{row['activation']:.2f}", *texts)
    return Group(*lines, Text(), table)


def _token(example: Mapping[str, Any]) -> str:
    """Return the token of an example; its position where a run of an earlier version doesn't tell."""
    if example["token"]:
        start, stop = example["token"]
        return str(example["caption"][start:stop]).strip() or "blank"
    if example["image_token"]:
        number, count = example["image_token"]
        return f"image, {number} of {count}"
    return f"at {example['position']}"


def status(status: Status, failures: Iterable[dict[str, Any]], uri: str) -> RenderableType:
    """Return the progress of a run's census."""
    # A finished run has pending shards again once a refresh has begun.
    state = "finished" if status.finished and not status.pending else "not finished: run mmray census again to go on"
    lines: list[RenderableType] = [
        Text.assemble((uri, "bold"), (f" · {state}", "dim")),
        Text(
            f"shards    {status.shards_done} done, {status.pending} pending, {len(status.quarantined)} quarantined "
            f"of {status.shards}"
        ),
        Text(
            f"samples   {status.samples_done:,} of {status.samples:,}, "
            f"{status.samples_per_second:.1f} per second and worker, {status.failures:,} failed"
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
    lines += [Text(f"slower    {note}") for note in status.cost.notes]
    lines += [Text(f"skipped   {line}") for line in skipped(status.skipped, status.samples_done)]
    lines += [Text(f"shard {number} quarantined: {reason}", "red") for number, reason in status.quarantined.items()]
    lines += [Text(line, "yellow") for line in _reasons(reasons(failures), "see the table errors")]
    return Group(*lines)


def spending(cost: Cost) -> str:
    """Return workers' time per phase, the longest first, and their peak memory; empty if receipts have neither."""
    total = cost.seconds + sum(cost.phases.get(name, 0.0) for name in AROUND)
    phases = {name: seconds / total for name, seconds in cost.phases.items()} if total else {}
    large = {name: share for name, share in phases.items() if share >= 0.01}
    rest = {"other": 1 - sum(large.values())} if sum(large.values()) <= 0.99 else {}
    shares = [f"{name} {share:.0%}" for name, share in (large | rest).items()]
    memory = [f"{size / 1e9:.1f} GB of {where} memory" for where, size in cost.memory.items()]
    spent = [f"{', '.join(shares)} of {total:,.0f} s"] if phases else []
    return "; ".join(spent + ([f"at most {' and '.join(memory)} per worker"] if memory else []))


def analyses(found: Sequence[AnalysisStatus]) -> RenderableType:
    """Return the progress of each analysis: one row each, then remarks on some of them."""
    shown = [one for one in found if not one.at_rest]
    counts: dict[str, list[int]] = {
        "pending": [one.pending for one in shown],
        "quarantined": [len(one.quarantined) for one in shown],
        "failed": [one.failures for one in shown],
    }
    # A count that is zero everywhere needs no column.
    counts = {name: numbers for name, numbers in counts.items() if any(numbers)}
    table = lineless("analysis", "done", *counts, "tables", left={"analysis", "tables"})
    for row, one in enumerate(shown):
        numbers = [
            f"{numbers[row]:,}" if name == "failed" else _units(numbers[row]) for name, numbers in counts.items()
        ]
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
    """Yield remarks on an analysis, each line with its style."""
    details = [f"{rate(one.rate, one.noun)} per worker"] if one.rate else []
    details += [spent] if (spent := spending(one.cost)) else []
    details += [f"driver {_driver(one.driver)}"] if one.driver is not None else []
    if details:
        yield "; ".join(details), "dim"
    yield from ((f"slower: {note}", "dim") for note in one.cost.notes)
    yield from ((line, "") for line in skipped(one.skipped, one.size_done))
    yield from ((f"unit {number} quarantined: {reason}", "red") for number, reason in one.quarantined.items())
    yield from ((line, "yellow") for line in _reasons(one.reasons, "see --json"))
    yield from ((line, "red") for line in one.damage)
    # While a driver works on it, there is nothing for the user to do.
    if one.at_work:
        return
    if one.pending:
        yield f"not finished; resume with: {one.renew}", "yellow"
    elif one.tables not in ("", "current"):
        yield f"tables {one.tables}; renew them: {one.renew}", "yellow"


def skipped(counts: Mapping[str, int], samples: int) -> list[str]:
    """Return one line per reason that samples were skipped for."""
    return [
        f"{count:,} of {samples:,} captions {'has' if count == 1 else 'have'} {reason}"
        for reason, count in counts.items()
    ]


def _reasons(found: Sequence[Reason], where: str) -> list[str]:
    """Return a line for each of the first reasons, and one for the others; `where` says where those are."""
    rest = found[SHOWN_REASONS:]
    failed = sum(len(reason.sources) for reason in rest)
    more = [f"and {failed:,} more for {len(rest):,} other reasons: {where}"] if rest else []
    return [_reason(reason) for reason in found[:SHOWN_REASONS]] + more


def _reason(reason: Reason) -> str:
    """Return one line on failures with the same reason: their number, stage and first sources."""
    shown, more = reason.sources[:SHOWN_SOURCES], len(reason.sources) - SHOWN_SOURCES
    where = ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
    count = f"{len(reason.sources):,} × " if len(reason.sources) > 1 else ""
    return f"{count}{reason.stage}: {where}: {reason.message}"


def drift(drift: Drift, rows: int = 8) -> RenderableType:
    """Return the differences of two runs: the least similar concepts, and the neurons with the largest shifts."""
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
    concepts = lineless("concept", "overlap", f"Jaccard@{drift.k}", "Spearman", "occurrences", left={"concept"})
    # Changed concepts come first.
    for row in drift.concepts.slice(0, min(rows, changed)).to_pylist():
        correlation = "" if row["spearman"] is None else f"{row['spearman']:.3f}"
        counts = f"{row['n_before']:,} → {row['n_after']:,}"
        concepts.add_row(Text(row["concept"]), f"{row['overlap']:.3f}", f"{row['jaccard']:.3f}", correlation, counts)
    neurons = lineless("neuron", "shift in std", "mean", "active", left={"neuron"})
    for row in drift.neurons.slice(0, rows).to_pylist():
        mean = f"{row['mean_before']:.3f} → {row['mean_after']:.3f}"
        active = f"{row['active_before']:.1%} → {row['active_after']:.1%}"
        neurons.add_row(row["neuron"], f"{row['shift']:+.3f}", mean, active)
    return Group(*lines, Text(), concepts, Text(), neurons)


def summary(run: Run, concepts: Sequence[str], k: int = 4) -> RenderableType:
    """Return these concepts with their highest neurons."""
    parts: list[RenderableType] = []
    for concept in concepts:
        rows = run.rank(concept, k)
        parts += [ranking(rows, concept_title(run, rows)), Text()]
    return Group(*parts)


def plan(plan: CensusEstimate, price: float | None = None) -> RenderableType:
    """Return what a census would cost, at this price per worker and hour, and what the first rows of its data hold."""
    duration = f"{plan.hours:.1f} hours" if plan.hours >= 1 else f"{plan.hours * 60:.1f} minutes"
    basis = f"{plan.teraflops:,.0f} TFLOP at {plan.speed:.2g} TFLOP/s"
    if timing := plan.timing:
        spent = spending(Cost(timing.seconds, dict(timing.phases), {}))
        basis = f"measured on {timing.samples:,} samples, {timing.samples / timing.seconds:.3g} per second: {spent}"
    rows = plan.sample
    languages = ", ".join(f"{language} {count}" for language, count in rows.languages.items()) or "none"
    nouns = ", ".join(f"{noun} {count}" for noun, count in rows.frequent) or "none"
    memory = plan.memory
    fits = f"fits {', '.join(memory.gpus)}" if memory.gpus else "needs --gpus-per-worker 2 or more"
    kept = (
        f"kept      {plan.kept:,} of {plan.neurons:,} neurons per concept and shard; with many shards few ranks are "
        "certified, and more --candidates certify more"
    )
    return Group(
        Text(f"samples   {plan.samples:,}, about {plan.positions:.0f} tokens and {plan.occurrences:.1f} nouns each"),
        Text(f"shards    {plan.shards:,}"),
        Text(f"time      {duration} with {plan.workers} worker{'s' * (plan.workers > 1)} like this machine ({basis})"),
        *([] if price is None else [Text(f"price     about {plan.worker_hours * price:,.2f} at {price:g} per hour")]),
        Text(f"bytes     about {plan.bytes_written / 1e9:.2g} GB written to the run"),
        Text(
            f"memory    about {memory.total / 1e9:.3g} GB per worker on a GPU (weights {memory.weights / 1e9:.3g}, "
            f"batch {memory.batch / 1e9:.2g}, sums {memory.sums / 1e9:.2g}): {fits}"
        ),
        Text(
            f"looked at {rows.rows} rows: {rows.unreadable} unreadable, {rows.without_nouns} without a noun; "
            f"{'languages as guessed' if rows.guessed else 'languages'}: {languages}"
        ),
        Text(f"nouns     by {rows.source}: {nouns}"),
        *(Text(f"warning   {line}", "yellow") for line in rows.warnings),
        *([Text(kept)] if plan.kept < plan.neurons else []),
    )
