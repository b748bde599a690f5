"""What locating finds on the demo, and that it matters: `python -m tests.bench.demo_figures [RUN] [--data FILE]`.

1. How many concepts with three or more English occurrences have their own token among the ten tokens of one of their
   ten highest neurons.
2. The mean probability of the noun of the twelve most frequent English concepts, untouched, with each concept's 100
   highest neurons zeroed, and with as many random neurons of the same layers zeroed.

Without RUN, a census of the data is made first.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import mmray
from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.features.census.inputs import open_data
from mmray.features.census.settings import census_settings
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import noun_source
from mmray.neurons.controls import layer_matched
from mmray.neurons.model import NeuronModel, open_image
from mmray.neurons.scoring import score_batch
from mmray.neurons.token_positions import locate_mentions
from mmray.runs.run import Run
from tests.bench.writing import markdown, write


@dataclass(frozen=True)
class Figures:
    """What the run shows."""

    concepts: int
    own_token: float
    untouched: float
    zeroed: float
    random: float


def measure(run: Run, model: NeuronModel, samples: list[Sample], zeroed: int = 100, frequent: int = 12) -> Figures:
    """Measure both figures on these samples (English ones are used)."""
    english = {row["sample_id"] for row in run.table("captions").to_pylist() if row["language"] == "en"}
    occurrences = [row for row in run.table("occurrences").to_pylist() if row["sample_id"] in english]
    counts = Counter(row["concept"] for row in occurrences)
    tokens = {row["concept"]: row["token"] for row in occurrences}
    tried = [concept for concept, count in counts.items() if count >= 3]
    found = [
        concept
        for concept in tried
        if any(tokens[concept] in row for row in run.rank(concept, 10)["tokens"].to_pylist())
    ]
    places = defaultdict(set)
    for row in occurrences:
        places[row["concept"]].add(row["sample_id"])
    by_id = {sample.sample_id: sample for sample in samples}
    settings = ("untouched", "zeroed", "random")
    means: dict[str, list[float]] = {setting: [] for setting in settings}
    for concept, _ in counts.most_common(frequent):
        rows = run.rank(concept, zeroed).select(["layer", "unit"]).to_pylist()
        best = [(row["layer"], row["unit"]) for row in rows]
        chosen = layer_matched(model.widths, best, concept)
        own = [by_id[sample_id] for sample_id in sorted(places[concept]) if sample_id in by_id]
        for setting, neurons in zip(settings, (None, best, chosen), strict=True):
            with mmray.ablate(model, neurons) if neurons else nullcontext():
                means[setting].append(noun_probability(model, own, concept))
    return Figures(
        len(tried), len(found) / len(tried), *(sum(means[setting]) / len(means[setting]) for setting in settings)
    )


def noun_probability(model: NeuronModel, samples: list[Sample], concept: str) -> float:
    """Return the mean probability of the concept's first token, over its occurrences in these samples' captions."""
    prompts = [prompt_text(model, None, sample.language) for sample in samples]
    encoded = [tokenize_caption(model, prompt, sample.caption) for prompt, sample in zip(prompts, samples, strict=True)]
    images = [open_image(sample.image) for sample in samples]
    batch = encode(model, prompts, images, [ids for ids, _ in encoded], [offsets for _, offsets in encoded])
    nouns = noun_source("objects", [concept], {})
    places = [
        place
        for row, sample in enumerate(samples)
        for place in locate_mentions(
            batch, row, sample.sample_id, nouns.find(sample.caption, sample.language, (concept,))
        )
    ]
    probabilities = [math.exp(value) for value in score_batch(model, batch, places).log_prob.tolist()]
    return sum(probabilities) / len(probabilities)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        run = mmray.open_run(arguments.run) if arguments.run else mmray.census(arguments.model, arguments.data, out)
        source = open_data(census_settings({"model": arguments.model, "data": arguments.data, "out": out}))
        files = source.files()
        shard = cut(files, sum(file.rows for file in files)).shards[0]
        samples = [row for row in read_shard(source, shard) if isinstance(row, Sample)]
        figures = measure(run, mmray.load_model(arguments.model), samples)
    table = markdown(
        ["what is measured", "value"],
        [
            ["nouns with three or more English occurrences", f"{figures.concepts}"],
            ["of them written by one of their ten highest neurons", f"{figures.own_token:.1%}".replace("%", " %")],
            ["mean P(noun) of the 12 most frequent nouns", f"{figures.untouched:.3f}"],
            ["the same with each noun's 100 highest neurons zeroed", f"{figures.zeroed:.3f}"],
            ["the same with as many random neurons of the same layers zeroed", f"{figures.random:.3f}"],
        ],
    )
    print(table, end="")
    if arguments.write:
        write("mmray/features/census/README.md", "python -m tests.bench.demo_figures --write", table)


if __name__ == "__main__":
    main()
