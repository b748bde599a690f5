"""A neuron that was planted to write a word is found first, and without it the word goes."""

import pytest
import torch

import mmray
from mmray.models.generation import generate
from mmray.models.parts import set_output_rows, unembedding_rows
from mmray.models.prompting import prompt_text
from mmray.neurons.activation_cache import forward
from mmray.neurons.model import load_model
from tests.support.samples import analyse, batch_of, merged, picture, sample

LAYER, UNIT = 1, 29
PLANTED = f"L{LAYER}.u{UNIT}"
FRAMES = ("An image of a {}", "A photo of a {}", "the girl and a {}", "a {}", "in the sea a {}")
NOUNS = ("dog", "cat", "ball", "horse", "hat")
CAPTIONS = [frame.format(noun) for frame in FRAMES for noun in NOUNS]
ENTRANCES = {"gate_proj": ("gate_proj", "up_proj"), "fc2": ("fc1",)}
"""The Linears before the activation, by one that stands next to them."""


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "blip2_opt", "internvl"])
def model(request, tiny):
    """Return a model of its own with a neuron that opens where a noun is next, and writes `dog`'s first token."""
    model = load_model(str(tiny(request.param)))
    network, projection = model.network, model.projections[LAYER]
    parent, _, sibling = (projection.gate or projection.path).rpartition(".")
    entrances = [network.get_submodule(f"{parent}.{name}") for name in ENTRANCES[sibling]]
    states = []
    handle = entrances[0].register_forward_hook(lambda *call: states.append(call[1][0].flatten(0, -2)))
    batch, places = batch_of(model, CAPTIONS)
    with torch.inference_mode():
        forward(model, batch)
    handle.remove()
    counted = [run.row * batch.positions + place for run in batch.spans for place in range(run.start, run.stop)]
    before = [place.row * batch.positions + place.position for place in places]
    wanted = torch.tensor([float(place in before) for place in sorted({*counted, *before})])
    inputs = states[0][sorted({*counted, *before})]
    # The direction in the MLP's input that best tells places before a noun from all others.
    weight = (1 + 20 * wanted)[:, None]
    direction = torch.linalg.lstsq(inputs * weight, (2 * wanted - 0.5)[:, None] * weight).solution[:, 0]
    for entrance in entrances:
        entrance.weight[UNIT] = 2 * direction
        if entrance.bias is not None:
            entrance.bias[UNIT] = 0.0
    row = unembedding_rows(network, model.parts)[places[0].token]
    set_output_rows(network, projection, torch.tensor([UNIT]), (30 * row / row.norm())[None])
    return model


@pytest.fixture(scope="module")
def rankings(model):
    shards = [
        analyse(model, [sample(number, CAPTIONS[number]) for number in range(first, first + 5)], top_k=3)
        for first in range(0, len(CAPTIONS), 5)
    ]
    return merged(model, shards, top_k=3)["rankings"].to_pylist()


def test_the_census_ranks_it_first(rankings):
    own = {row["rank"]: row for row in rankings if row["concept"] == "dog"}
    assert own[1]["neuron"] == PLANTED
    assert (own[1]["specific_rank"], own[1]["share"], own[1]["n"]) == (1, 1.0, len(FRAMES))
    assert own[1]["certified"]
    assert own[1]["score"] > 5 * own[2]["score"] > 0
    assert own[1]["specific"] > 3 * own[2]["specific"]


def test_ablating_it_removes_the_word_and_ablating_others_does_not(model):
    blank = "" if prompt_text(model, None, "en")[-1].isspace() else " "
    prompts = [f"{prompt_text(model, None, 'en')}{blank}{frame.format('').rstrip()}" for frame in FRAMES]
    images = [picture(100 + number) for number in range(len(FRAMES))]
    dog = model.tokenizer(" dog", add_special_tokens=False).input_ids[0]

    def says_dog():
        return [row[:1] == [dog] for row in generate(model, prompts, images, longest=1)]

    assert all(says_dog())
    with mmray.ablate(model, [PLANTED]):
        assert not any(says_dog())
    random = torch.Generator().manual_seed(0)
    units = torch.randperm(model.widths[LAYER], generator=random)[:12].tolist()
    for unit in units:
        if unit != UNIT:
            with mmray.ablate(model, [(LAYER, unit)]):
                assert all(says_dog())
    assert all(says_dog())


def test_its_word_loses_probability_without_it(model):
    def log_probs():
        rows = analyse(model, [sample(number, CAPTIONS[number]) for number in range(0, 25, 5)])["occurrences"]
        found = [row["log_prob"] for row in rows.select(["concept", "log_prob"]).to_pylist() if row["concept"] == "dog"]
        assert len(found) == len(FRAMES)
        return torch.tensor(found)

    whole = log_probs()
    with mmray.ablate(model, [PLANTED]):
        without = log_probs()
    with mmray.ablate(model, [(LAYER, UNIT - 1)]):
        other = log_probs()
    assert (without < whole - 3).all()
    assert (other > whole - 1).all()
