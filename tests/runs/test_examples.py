"""An example says which token the neuron is most active at, as the model read it."""

from pathlib import Path
from typing import Any

import pytest

from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.models.capture import capture_input
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import NounSource
from mmray.runs.run import Run, open_run
from tests.support.samples import samples_of


@pytest.mark.parametrize("name", ["run", "coco_run"])
def test_the_token_after_an_occurrence_is_the_noun(name: str, request: pytest.FixtureRequest) -> None:
    """Its position predicts the token; in rows of one caption, and of five."""
    found = request.getfixturevalue(name)
    opened: Run = found if isinstance(found, Run) else open_run(found)
    captions = {row["sample_id"]: row for row in opened.table("captions").to_pylist()}
    occurrences = opened.table("occurrences").to_pylist()
    assert occurrences
    for row in occurrences:
        caption = captions[row["sample_id"]]
        span = caption["token_spans"][row["position"] + 1 - caption["text_start"]]
        assert caption["caption"][span["start"] : span["stop"]].strip() == row["token"]


def test_activations_of_examples_are_those_at_their_tokens(coco_run: Path, coco: Any, demo: Any) -> None:
    """Each activation is that of the neuron at the named token of caption or image, in a row of its own."""
    run = open_run(coco_run)
    name = run.rank(next(iter(run.concepts)), 1)["neuron"][0].as_py()
    layer, unit = run.names.parse(name)
    rows = run.neuron(name)["examples"]
    samples = {sample.sample_id: sample for sample in samples_of(coco.train, 1000)}
    analysis = ShardAnalysis(
        demo, census_settings({"model": "demo", "data": "demo", "out": "unused"}), NounSource("objects", ()), 0
    )
    kinds = set()
    for row in rows:
        sample = samples[row["sample_id"]]
        ((_, batch),) = analysis.encoded([sample])
        seen: list[Any] = []
        with capture_input(demo.network.get_submodule(demo.projections[layer].path), seen.append):
            forward(demo, batch)
        activation = float(seen[0].reshape(-1, seen[0].shape[-1])[row["position"], unit])
        assert activation == pytest.approx(row["activation"], rel=1e-3, abs=1e-4)
        kinds.add("image" if row["image_token"] else "text")
        if row["image_token"]:
            number, count = row["image_token"]
            (span,) = [span for span in batch.spans if span.modality == "image"]
            assert (number, count) == (row["position"] - span.start + 1, span.stop - span.start)
        else:
            ids = batch.inputs["input_ids"][0].tolist()
            start, stop = row["token"]
            assert demo.tokenizer.decode([ids[row["position"]]]).strip() == sample.caption[start:stop].strip()
    assert kinds
