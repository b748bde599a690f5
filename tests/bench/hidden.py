"""What a census adds to a forward, by hidden size: `python -m tests.bench.hidden [--sizes 64 512 1024] [--write]`.

A forward's matrix products grow with the hidden size, and what a census does per neuron and token does not. Models have
random weights, a few layers of 11,008 MLP neurons as LLaVA-1.5-7B has, and the demo's scenes. A census goes from
encoded images to committed files; a plain forward has the same batches prepared in memory. All is CPU time of one core,
per neuron and token. The last column extrapolates: the forward by a line through the sizes, plus the components of the
largest one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from mmray.features.census import shard
from mmray.features.census.reduction import ConceptSums
from mmray.neurons import scoring
from mmray.neurons import statistics as token_statistics
from mmray.neurons.split_on_oom import heap_kept
from mmray.runs import RunFolder
from tests.bench import size
from tests.bench.attribution import Shape
from tests.bench.writing import markdown, write

LLAVA = 4_096
"""Hidden size of LLaVA-1.5-7B."""
PLAIN, KEPT = "plain forward", "plain forward with freed memory kept, as in a census"
COMPONENTS: dict[str, tuple[Any, str]] = {
    "sums and extremes of every token": (token_statistics, "reduce_tokens"),
    "examples": (token_statistics._Extremes, "improved"),
    "scores of the nouns": (scoring, "score_captured"),
    "sums by concept": (ConceptSums, "add"),
    "rows of `occurrences`": (shard, "occurrence_table"),
    "end of the shard": (ConceptSums, "tables"),
    "encoding and committing": (RunFolder, "commit_shard"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512, 1_024])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    columns = [measured(hidden, arguments) for hidden in arguments.sizes]
    columns.append(extrapolated(arguments.sizes, columns))
    heads = [*map("{:,}".format, arguments.sizes), f"{LLAVA:,}, computed"]
    rows = [[name, *(f"{column[name]:.2f}" for column in columns)] for name in columns[0]]
    for name in (PLAIN, KEPT):
        rows.append([f"{name} ÷ census", *(f"{column[name] / column['census']:.2f}" for column in columns)])
    table = markdown(["ns per neuron and token, by hidden size", *heads], rows)
    print(table)
    if arguments.write:
        write("tests/bench/README.md", "python -m tests.bench.hidden --write", table)


def measured(hidden: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the nanoseconds per neuron and token of a plain forward, a census, and its components."""
    wide = size.SHAPES["wide"]
    text = wide.text | {"hidden_size": hidden, "num_hidden_layers": arguments.layers}
    shape = Shape(wide.vision, text)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as out, patch.dict(size.SHAPES, {"hidden": shape}):
        given = argparse.Namespace(shape="hidden", device="cpu", batch_size=32, concepts=200, samples=arguments.samples)
        bench = size.Bench(given, out)
        prepared = [batch for _, batch in bench.analysis().encoded(bench.samples)]
        values = sum(batch.rows * batch.positions for batch in prepared) * sum(bench.model.widths)
        bench.plain(prepared[:1])
        for _ in range(arguments.rounds):
            seconds = {PLAIN: bench.plain(prepared)}
            with heap_kept(bench.model.device):
                seconds[KEPT] = bench.plain(prepared)
            with timed() as spent:
                seconds["census"] = bench.census()[0]
            found.append(seconds | spent)
    return {name: statistics.median(one[name] for one in found) / values * 1e9 for name in found[0]}


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Add up the CPU seconds of each component inside the `with` block."""
    spent: dict[str, float] = dict.fromkeys(COMPONENTS, 0.0)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return function(*given, **named)
            finally:
                spent[name] += time.process_time() - began

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in COMPONENTS.items():
            stack.enter_context(patch.object(owner, attribute, watched(name, getattr(owner, attribute))))
        yield spent


def extrapolated(sizes: Sequence[int], columns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return what a model of LLAVA's hidden size would take."""
    lines = {
        name: float(np.polynomial.Polynomial.fit(sizes, [column[name] for column in columns], 1)(LLAVA))
        for name in (PLAIN, KEPT)
    }
    last = columns[-1]
    # Not the difference of census and forward: at this size it is as small as the noise of the two.
    return last | lines | {"census": lines[KEPT] + sum(last[name] for name in COMPONENTS)}


if __name__ == "__main__":
    main()
