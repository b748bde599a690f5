"""The playground changes what it says, for the request only; its maps and probabilities are the model's."""

import pytest
import torch

import mmray
from mmray.errors import InputError
from mmray.features.editing.edit import Purpose, WeightEdit
from mmray.models.parts import output_rows
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neuron_names import PLAIN
from mmray.neurons.model import open_image
from mmray.report.writing import run_samples
from mmray.runs.run import open_run
from mmray.serve.playground import Playground


@pytest.fixture(scope="module")
def scene(dogs) -> bytes:
    run = open_run(dogs)
    sample = next(row["sample_id"] for row in run.table("occurrences").to_pylist() if row["concept"] == "dog")
    image = next(run_samples(run, [sample])).image
    assert image
    return image


@pytest.fixture(scope="module")
def zeroing(dogs):
    """The neurons of a concept, and an edit that takes their rows of W_out away."""
    model = mmray.load_model("demo")
    names = open_run(dogs).rank("dog", 60)["neuron"].to_pylist()
    layers, units = (torch.tensor(part) for part in zip(*map(PLAIN.parse, names), strict=True))
    rows = [
        output_rows(model.network, model.projections[layer])[unit] for layer, unit in zip(layers, units, strict=True)
    ]
    return names, WeightEdit(layers, units, -torch.stack(rows), (Purpose("suppress", "dog"),), model.digest)


@pytest.fixture(scope="module")
def playground(zeroing, tmp_path_factory) -> Playground:
    folder = tmp_path_factory.mktemp("edit") / "no-dog"
    zeroing[1].save(folder)
    return Playground("demo", {"no-dog": str(folder)})


def test_a_factor_of_one_changes_nothing(playground, scene):
    found = playground.compare(scene, neurons=["L7.u10", "L3.u5"], factor=1.0)
    assert found["before"]["caption"] == found["after"]["caption"] == playground.model.caption(scene)
    for token in found["before"]["tokens"]:
        assert token["before"] == pytest.approx(token["after"], abs=1e-6)
        # Greedy: each token is the likeliest.
        assert token["likeliest_before"][0] == (token["text"], pytest.approx(token["before"]))
    assert "dog" in [token["text"] for token in found["before"]["tokens"]]


def test_zeroing_layers_changes_the_caption_and_is_undone(playground, scene, dogs):
    before = {name: weight.clone() for name, weight in playground.model.network.state_dict().items()}
    rows = open_run(dogs).rank("dog", 100)["neuron"].to_pylist()
    found = playground.compare(scene, neurons=rows, factor=-4.0)
    token = next(token for token in found["before"]["tokens"] if token["text"] == "dog")
    assert token["after"] < token["before"] - 0.2
    assert found["before"]["caption"] == playground.model.caption(scene)
    assert all(torch.equal(weight, before[name]) for name, weight in playground.model.network.state_dict().items())


def test_an_edit_that_takes_rows_away_is_zeroing_their_neurons(playground, scene, zeroing):
    by_edit = playground.compare(scene, edit="no-dog")
    by_factor = playground.compare(scene, neurons=zeroing[0])
    assert by_edit["after"]["caption"] == by_factor["after"]["caption"]
    for one, other in zip(by_edit["before"]["tokens"], by_factor["before"]["tokens"], strict=True):
        assert one["after"] == pytest.approx(other["after"], abs=1e-4)


def test_probabilities_are_those_of_the_network(playground, scene):
    model = playground.model
    found = playground.compare(scene, neurons=["L0.u0"], factor=1.0)
    prompt, picture = prompt_text(model, None, None), open_image(scene)
    tokens, offsets = tokenize_caption(model, prompt, found["before"]["caption"])
    batch = encode(model, [prompt], [picture], [tokens], [offsets])
    with torch.inference_mode():
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits[0]
    for place, (token, row) in enumerate(zip(tokens, found["before"]["tokens"], strict=True)):
        chance = logits[batch.caption_start[0] - 1 + place].float().softmax(dim=0)[token]
        assert row["before"] == pytest.approx(float(chance), abs=1e-5)


def test_a_map_is_the_models_and_one_byte_a_patch(playground, scene):
    found = playground.heat_map(scene, ["L7.u10"])
    values, _ = playground.model.patch_map(scene, "L7.u10")
    assert (found["rows"], found["columns"]) == values.shape
    assert found["low"] == pytest.approx(float(values.min()), rel=1e-3)
    assert found["high"] == pytest.approx(float(values.max()), rel=1e-3)


def test_what_cannot_be_done_is_one_line(playground, scene):
    with pytest.raises(InputError, match=r"nothing to change"):
        playground.compare(scene)
    with pytest.raises(InputError, match=r"no edit 'x'; there are no-dog"):
        playground.compare(scene, edit="x")
    with pytest.raises(InputError, match=r"outside demo"):
        playground.compare(scene, neurons=["L99.u0"])
    with pytest.raises(InputError, match=r"outside demo"):
        playground.heat_map(scene, ["L99.u0"])
