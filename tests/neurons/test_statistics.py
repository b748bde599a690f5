"""Statistics of tokens are those of a plain loop; a forward that fails midway leaves no trace."""

from collections import defaultdict
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.data.samples import Sample
from mmray.models.capture import capture_activations
from mmray.models.prompting import Path, TokenSpan
from mmray.neurons import token_sums
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.tables import EXAMPLES
from mmray.neurons.token_sums import MODALITIES, reduce_tokens, token_spans
from mmray.runs.tables import from_bytes, to_bytes
from tests.support.samples import CAPTIONS, analyse, batch_of, sample, samples

WIDTHS = (3, 2)
LABELS = (
    {},
    {"language": "en"},
    {"language": "es", "domain": "photo"},
    {"language": "en", "domain": "art", "year": "7"},
)

IMAGES = (None, None, "a", "b", "c")


@dataclass
class Announced:
    """A batch: its rows' labels, images and runs, and whole numbers as activations and gates of each layer."""

    labels: list[dict[str, str]]
    images: list[str | None]
    runs: list[TokenSpan]
    positions: int
    activations: list[torch.Tensor]
    gates: list[torch.Tensor]


def invent(random: Random, rows: int, ties: bool) -> Announced:
    """Rows of different lengths with up to two runs of image and one of text, the same in some rows."""
    positions, runs = 14, []
    for row in range(rows):
        start = random.choice([1, 2])
        for _ in range(random.choice([0, 1, 2])):
            stop = start + random.choice([1, 2])
            runs.append(TokenSpan(row, start, stop, "image"))
            start = stop + random.choice([0, 1])
        runs.append(TokenSpan(row, start, start + random.choice([1, 2, 5]), "text"))
    random.shuffle(runs)
    largest, generator = 3 if ties else 400, torch.Generator().manual_seed(random.randrange(2**30))
    tensors = [
        torch.randint(-largest, largest + 1, (rows * positions, width), generator=generator).float()
        for width in (*WIDTHS, *WIDTHS)
    ]
    labels, images = ([random.choice(several) for _ in range(rows)] for several in (LABELS, IMAGES))
    return Announced(labels, images, runs, positions, tensors[:2], tensors[2:])


def see(statistics: TokenStatistics, batch: Announced, layers: int = len(WIDTHS)) -> None:
    statistics.begin(batch.labels, batch.runs, batch.images)
    for layer in range(layers):
        statistics.add(layer, batch.activations[layer], batch.gates[layer])


def by_hand(batches: list[Announced]):
    """Return activity by (kind, label, modality), of each neuron what each sample has, and the samples' images."""
    activity = defaultdict(lambda: [0, *np.zeros((3, sum(WIDTHS)))])
    extremes = defaultdict(list)
    shown = set()
    images: list[str | int] = []
    number = 0
    for batch in batches:
        for row, labels in enumerate(batch.labels):
            tokens = []
            image = number if batch.images[row] is None else batch.images[row]
            # An image counts once per label.
            new = {(*key, image) for key in (("all", "all"), *labels.items())} - shown
            shown |= new
            for run in batch.runs:
                if run.row == row and (new or run.modality == "text"):
                    tokens += [
                        (row * batch.positions + place, place, run.modality) for place in range(run.start, run.stop)
                    ]
            values = torch.cat(batch.activations, dim=1)
            gates = torch.cat(batch.gates, dim=1)
            for index, _, modality in tokens:
                for key in {("all", "all"), *labels.items()}:
                    if modality == "image" and (*key, image) not in new:
                        continue
                    entry = activity[*key, modality]
                    entry[0] += 1
                    entry[1] += (gates[index] > 0).numpy()
                    entry[2] += values[index].numpy()
                    entry[3] += values[index].numpy() ** 2
            for neuron in range(sum(WIDTHS)):
                seen = {place: float(values[index, neuron]) for index, place, _ in tokens}
                extremes[neuron].append((number, seen))
            images.append(image)
            number += 1
    return activity, extremes, images


def check(statistics: TokenStatistics, batches: list[Announced], ties: bool) -> None:
    activity, extremes, images = by_hand(batches)
    table = from_bytes(to_bytes(statistics.activity_table()))
    rows = {(row["label_kind"], row["label"], row["modality"]): row for row in table.to_pylist()}
    assert rows.keys() == activity.keys()
    assert len(rows) == len(table)
    for key, (tokens, active, total, squares) in activity.items():
        assert rows[key]["n_tokens"] == tokens
        assert rows[key]["n_active"] == active.tolist()
        assert rows[key]["sum"] == total.tolist()
        assert rows[key]["sum_squares"] == squares.tolist()
    examples = from_bytes(to_bytes(statistics.examples_table())).to_pylist()
    ranks = min(EXAMPLES, len(set(images)))
    assert [(row["sign"], row["rank"]) for row in examples] == [(s, r + 1) for s in (1, -1) for r in range(ranks)]
    for sign in (1, -1):
        ranked = [row for row in examples if row["sign"] == sign]
        for neuron, seen in extremes.items():
            by_image = defaultdict(list)
            for number, values in seen:
                by_image[images[number]].append(max(sign * value for value in values.values()))
            best = sorted(map(max, by_image.values()), reverse=True)
            found = [row["activation"][neuron] * sign for row in ranked]
            assert found == best[:EXAMPLES]
            named = [images[row["sample"][neuron]] for row in ranked]
            assert len(set(named)) == len(named)
            for row in ranked:
                values = dict(seen)[row["sample"][neuron]]
                assert values[row["position"][neuron]] == row["activation"][neuron]


@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_statistics_are_those_of_a_loop_over_tokens(seed, sizes, ties):
    random = Random(seed)
    batches = [invent(random, rows, ties) for rows in sizes]
    statistics = TokenStatistics(WIDTHS)
    for batch in batches:
        if random.random() < 0.4:
            # Memory runs out in the first or behind the last layer; another label stays unknown.
            failing = invent(random, 2, ties)
            failing.labels[0] = {"domain": f"failed {random.random()}"}
            see(statistics, failing, layers=random.choice([0, 1, 2]))
        see(statistics, batch)
        statistics.commit()
    assert statistics.samples == sum(sizes)
    assert statistics.non_finite() == [0] * sizes[-1]
    check(statistics, batches, ties)


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_samples_that_share_a_row_count_as_apart(seed, rows):
    """A row holds an image at 1 to 4, and captions that share no, some or all of their tokens, in any order."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    paths = []
    for row in range(rows):
        for _ in range(random.choice([1, 2, 3])):
            places = random.sample(range(5, 20), random.choice([1, 2, 4]))
            # Captions begin where prompts end, and these differ.
            paths.append(Path(row, [*range(4), *([4] if random.random() < 0.5 else []), *places]))
    labels = [random.choice(LABELS) for _ in paths]
    images = [random.choice([None, f"{path.row}"]) for path in paths]
    spans = [
        span
        for number, path in enumerate(paths)
        for span in (TokenSpan(number, 1, 4, "image"), TokenSpan(number, 4, len(path.positions), "text"))
    ]
    pairs = [
        torch.randint(-400, 400, (2, rows, 20, width), generator=generator, dtype=torch.int32).float()
        for width in WIDTHS
    ]
    together, apart = TokenStatistics(WIDTHS), TokenStatistics(WIDTHS)
    for counted in (together, apart):
        # Some images may have counted before.
        first = invent(Random(seed), 2, False)
        first.images = ["0", None]
        see(counted, first)
        counted.commit()
    together.begin(labels, spans, images, paths)
    apart.begin(labels, spans, images)
    longest = max(len(path.positions) for path in paths)
    for layer, (values, gates) in enumerate(pairs):
        together.add(layer, values.flatten(0, 1), gates.flatten(0, 1))
        alone = torch.zeros(2, len(paths), longest, values.shape[-1])
        for number, path in enumerate(paths):
            for part, whole in zip(alone, (values, gates), strict=True):
                part[number, : len(path.positions)] = whole[path.row, path.positions]
        apart.add(layer, *alone.flatten(1, 2))
    assert together.non_finite() == apart.non_finite()
    for counted in (together, apart):
        counted.commit()
    assert together.activity_table().equals(apart.activity_table())
    assert together.examples_table().equals(apart.examples_table())


def test_nothing_seen_gives_empty_tables():
    statistics = TokenStatistics(WIDTHS)
    see(statistics, invent(Random(0), 2, False))
    assert len(statistics.activity_table()) == len(statistics.examples_table()) == 0


@given(st.integers(0, 10**6))
def test_spans_cover_the_runs_and_nothing_else(seed):
    runs = invent(Random(seed), 4, False).runs
    spans = token_spans(runs, 4)
    covered = {
        (row, span.start + place, modality)
        for modality, span in zip(MODALITIES, spans, strict=True)
        for row, _, place in span.mask.nonzero().tolist()
    }
    assert covered == {(run.row, place, run.modality) for run in runs for place in range(run.start, run.stop)}
    for span in spans:
        assert (span.outside is None) == bool(span.mask.all())
        assert span.outside is None or torch.equal(span.outside[:, :, 0] == 0, span.mask[:, 0] == 1)


@pytest.mark.parametrize("cached", [1, 60])
def test_reduction_in_parts_is_that_of_the_whole(monkeypatch, cached):
    batch = invent(Random(5), 4, False)
    spans = token_spans(batch.runs, 4)
    parts = [part[0].reshape(4, batch.positions, -1) for part in (batch.activations, batch.gates)]
    whole = reduce_tokens(*parts, spans)
    monkeypatch.setattr(token_sums, "CACHED", cached)
    for one, other in zip(whole, reduce_tokens(*parts, spans), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "few"), [("BLOCK", 1), ("BLOCK", 3), ("READ", 1), ("READ", 50)])
def test_blocks_of_positions_and_reads_change_nothing(monkeypatch, name, few):
    batches = [invent(Random(seed), 4, ties=True) for seed in (5, 6)]
    tables = []
    for number in (1000, few):
        monkeypatch.setattr(token_sums, name, number)
        statistics = TokenStatistics(WIDTHS)
        for batch in batches:
            see(statistics, batch)
            statistics.commit()
        tables.append((statistics.activity_table(), statistics.examples_table()))
    for one, other in zip(*tables, strict=True):
        assert one.equals(other)


@pytest.mark.parametrize("variant", ["llava", "idefics3", "blip2_t5", "mllama", "qwen3_vl_moe"])
def test_of_a_model_every_image_and_caption_token_counts_once(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:4])
    seen = {}
    with (
        torch.inference_mode(),
        capture_activations(model.network, model.projections, lambda *call: seen.update({call[0]: call[1:]})),
    ):
        model.network(**batch.to(model.device, model.network.dtype))
    statistics = TokenStatistics(model.widths)
    statistics.begin([{}] * 4, batch.spans)
    for layer, pair in seen.items():
        statistics.add(layer, *pair)
    statistics.commit()
    rows = {row["modality"]: row for row in statistics.activity_table().to_pylist()}
    assert rows.keys() == ({"image", "text"} if model.parts.image_in_sequence else {"text"})
    for modality, row in rows.items():
        places = [
            run.row * batch.positions + place
            for run in batch.spans
            if run.modality == modality
            for place in range(run.start, run.stop)
        ]
        activation, gate = (
            torch.cat([pair[part][places] for pair in seen.values()], dim=1).double() for part in (0, 1)
        )
        assert row["n_tokens"] == len(places)
        assert row["n_active"] == (gate > 0).sum(0).tolist()
        np.testing.assert_allclose(row["sum"], activation.sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["sum_squares"], activation.square().sum(0), rtol=1e-4, atol=1e-6)


def test_labels_of_samples_are_counted_apart(open_model):
    model = open_model("llava")
    found: list[Sample] = [
        sample(0, "a dog", language="en", domain="photo"),
        sample(1, "a cat on a chair", language="en", labels={"source": "web", "missing": None}),
        sample(2, "a dog", language="en"),
    ]
    rows = analyse(model, found, batch_size=2)["activity"].to_pylist()
    tokens = {(row["label_kind"], row["label"], row["modality"]): row["n_tokens"] for row in rows}
    assert {key[:2] for key in tokens} == {("all", "all"), ("language", "en"), ("domain", "photo"), ("source", "web")}
    assert tokens["all", "all", "image"] == tokens["language", "en", "image"] == 3 * 16
    assert tokens["domain", "photo", "image"] == tokens["source", "web", "image"] == 16
    assert tokens["all", "all", "text"] > tokens["source", "web", "text"] > tokens["domain", "photo", "text"] > 0


def test_examples_name_captions_of_the_shard(open_model):
    model = open_model("llava")
    tables = analyse(model, samples(9), batch_size=2)
    alone = {entry.sample_id: analyse(model, [entry])["examples"].to_pylist() for entry in samples(9)}
    names = tables["captions"]["sample_id"].to_pylist()
    assert sorted(names) == sorted(alone)
    for row in tables["examples"].to_pylist():
        own = 0 if row["sign"] > 0 else 1
        for neuron in range(0, sum(model.widths), 7):
            expected = alone[names[row["sample"][neuron]]][own]
            assert row["activation"][neuron] == pytest.approx(expected["activation"][neuron], rel=1e-4, abs=1e-6)
            assert row["position"][neuron] == expected["position"][neuron]
