"""Every score is its formula, and the random control belongs to the sample alone."""

import pytest
import torch
from torch.nn import functional

from mmray.errors import InputError
from mmray.models.capture import capture_activations, capture_input
from mmray.models.norms import token_log_odds, token_logits
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.attribution import FUNCTIONS, Located, project
from mmray.neurons.gradients import SHORT, gradient_pass
from mmray.neurons.model import load_model
from mmray.neurons.scores import SCORES
from mmray.neurons.scoring import score_batch
from mmray.neurons.statistics import TokenStatistics
from tests.support.samples import CAPTIONS, analyse, batch_of, demo_samples, sample

BACKWARD = [name for name, kind in SCORES.items() if kind.backward]
GATES = {"llava": "act_fn", "gemma3": "act_fn", "instructblip_t5": "act", "mllama": "act_fn"}
TEXTS = (CAPTIONS[0], CAPTIONS[3], CAPTIONS[2])


def located(seed=0):
    random = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(4, 6, generator=random) for _ in range(3)]
    return Located(*numbers, seeds=torch.tensor([3, 4, 5, 3]))


def test_scores_are_their_formulas():
    given = located()
    for name, score in FUNCTIONS.items():
        found = score(given)
        assert found.shape == (4, 6), name
        for occurrence in range(4):
            for neuron in range(6):
                activation, gate, projection = (
                    float(part[occurrence, neuron]) for part in (given.activation, given.gate, given.projection)
                )
                expected = {
                    "contribution": activation * projection,
                    "gate": gate * projection,
                    "activation": activation,
                }
                if name in expected:
                    assert float(found[occurrence, neuron]) == pytest.approx(expected[name])
    assert set(FUNCTIONS) == {"contribution", "gate", "activation", "random"}


def test_random_is_a_function_of_the_seed_alone():
    first, second = FUNCTIONS["random"](located(0)), FUNCTIONS["random"](located(1))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[3])
    assert not torch.isclose(first[0], first[1]).any()
    assert 0 <= first.min() < 0.2
    assert 0.8 < first.max() <= 1


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_projection_is_the_product_in_fp32(count):
    random = torch.Generator().manual_seed(count)
    tokens = torch.randn(count, 16, generator=random).bfloat16()
    rows = torch.randn(5, 16, generator=random).bfloat16()
    found = project(tokens, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), tokens.double() @ rows.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", GATES)
def test_gate_score_leaves_out_the_factor(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    gates = []
    handles = []
    for projection in model.projections:
        module = model.network.get_submodule(projection.gate)
        handles.append(module.register_forward_hook(lambda *call: gates.append(call[2].flatten(0, -2).clone())))
    scored = score_batch(model, batch, places, "gate")
    for handle in handles:
        handle.remove()
    rows = [place.row * batch.positions + place.position for place in places]
    columns = unembedding_rows(model.network, model.parts)[[place.token for place in places]].double()
    for layer, projection in enumerate(model.projections):
        mlp = model.network.get_submodule(projection.gate.rpartition(".")[0])
        opened = getattr(mlp, GATES[variant])(gates[layer][rows]).double()
        written = output_rows(model.network, projection).double()
        for place in range(len(places)):
            expected = opened[place] * (written @ columns[place])
            torch.testing.assert_close(scored.scores[layer][place].double(), expected, rtol=1e-4, atol=1e-6)


def test_without_a_gate_its_score_is_the_contribution(open_model):
    model = open_model("blip2_opt")
    batch, places = batch_of(model, TEXTS)
    first, second = (score_batch(model, batch, places, score).scores for score in ("gate", "contribution"))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_score_is_the_activation(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    seen = {}
    with (
        torch.inference_mode(),
        capture_activations(model.network, model.projections, lambda *call: seen.update({call[0]: call[1]})),
    ):
        model.network(**batch.to(model.device, model.network.dtype))
    scored = score_batch(model, batch, places, "activation")
    rows = [place.row * batch.positions + place.position for place in places]
    for layer, activation in seen.items():
        torch.testing.assert_close(scored.scores[layer], activation[rows])
        assert torch.equal(scored.scores[layer], scored.activation[layer])


def random_lists(tables):
    return {
        (row["sample_id"], row["position"]): [(n["layer"], n["unit"], n["score"]) for n in row["neurons"]]
        for row in tables["occurrences"].to_pylist()
    }


def test_random_scores_belong_to_the_sample_whatever_its_batch(open_model):
    model = open_model("llava")
    found, nouns = demo_samples(48)
    found = [entry for entry in found if entry.language == "en"][:9]
    lists = [
        random_lists(analyse(model, order, nouns, batch_size=size, score="random"))
        for order, size in ((found, 4), (found[::-1], 2), (found, 9))
    ]
    assert lists[0] == lists[1] == lists[2]
    assert len(lists[0]) >= 9
    assert len({str(neurons) for neurons in lists[0].values()}) == len(lists[0])
    assert {entry[0] for neurons in lists[0].values() for entry in neurons} == {0, 1}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("captions", ["dataset", "generate"])
def test_samples_without_a_noun_are_counted_by_every_score(open_model, score, captions):
    tables = analyse(open_model("llava"), [sample(1, "nothing"), sample(2, "at all")], score=score, captions=captions)
    assert len(tables["captions"]) == 2
    assert len(tables["occurrences"]) == 0
    assert len(tables["errors"]) == 0
    assert sum(tables["activity"]["n_tokens"].to_pylist()) > 0


@pytest.mark.parametrize("score", BACKWARD)
@pytest.mark.parametrize("variant", ["llava", "blip2_opt", "gemma3", "qwen3_vl_moe", "blip2_t5", "mllama"])
def test_gradient_scores_are_what_a_step_along_the_activation_gives(open_model, variant, score):
    # Scale one neuron's activation a little, at the positions that count: the logit moves by step × score.
    model = open_model(variant)
    batch, places = batch_of(model, TEXTS)
    if score == "gradient" and not model.parts.image_in_sequence:
        with pytest.raises(InputError, match="--score gradient sums over the image's positions"):
            score_batch(model, batch, places, score)
        return
    statistics = TokenStatistics(model.widths)
    statistics.begin([{}] * len(TEXTS), batch.spans)
    products, _ = gradient_pass(model, batch, places, score, statistics=statistics)
    statistics.commit()
    assert statistics.samples == len(TEXTS)
    place = places[1]
    spans = {
        "gradient": [(run.start, run.stop) for run in batch.spans if (run.row, run.modality) == (place.row, "image")],
        "gradient-last": [(place.position, place.position + 1)],
        "effect": [(0, batch.positions)],
    }[score]
    rows = torch.cat([torch.arange(*span) for span in spans]) + place.row * batch.positions
    layer = 1 if score == "gradient-last" else 0
    found = products[layer]
    unit = int(found[1].abs().argmax())
    projection = model.projections[layer]
    activation = {}
    with (
        torch.inference_mode(),
        capture_activations(model.network, [projection], lambda *call: activation.update({0: call[1]})),
    ):
        model.network(**batch.to(model.device, model.network.dtype))
    row = output_rows(model.network, projection)[unit]
    logits = []
    number = token_log_odds if score == "effect" else token_logits
    for step in (-1e-2, 1e-2):
        written = torch.zeros(len(activation[0]), len(row))
        written[rows] = step * activation[0][rows, unit, None] * row
        module = model.network.get_submodule(projection.path)
        handle = module.register_forward_hook(lambda *call, written=written: call[2] + written.view(call[2].shape))
        states = []
        with torch.inference_mode(), capture_input(model.norm, states.append):
            model.network(**batch.to(model.device, model.network.dtype))
        handle.remove()
        state = states[0][place.row, place.position]
        logits.append(float(number(model, state[None], torch.tensor([place.token]))))
    slope = (logits[1] - logits[0]) / 2e-2
    assert float(found[1][unit]) == pytest.approx(slope, rel=0.05)
    assert functional.cosine_similarity(*found[:2], dim=0) < 0.99


def test_in_bf16_effects_are_those_of_fp32_to_its_precision(tiny):
    found = []
    for dtype in ("fp32", "bf16"):
        model = load_model(str(tiny("llava")), dtype)
        batch, places = batch_of(model, TEXTS)
        # Short enough for attention by plain products.
        assert batch.positions <= SHORT
        found.append(torch.cat(gradient_pass(model, batch, places, "effect")[0], dim=1))
    assert functional.cosine_similarity(*found, dim=1).min() > 0.99


def test_a_sample_without_an_image_has_no_gradient_over_it(open_model):
    model = open_model("llava")
    with pytest.raises(InputError, match="use gradient-last or effect") as refusal:
        model.contributions(None, "a dog", "dog", score="gradient")
    assert "\n" not in str(refusal.value)
    assert model.contributions(None, "a dog", "dog", score="gradient-last").any()
    tables = analyse(model, [sample(1, "a dog"), sample(2, "a dog", image=None)], score="gradient")
    assert set(tables["occurrences"]["sample_id"].to_pylist()) == {"s1"}
    (error,) = tables["errors"].to_pylist()
    assert (error["sample_id"], error["stage"]) == ("s2", "read")
    assert "--score gradient" in error["message"]
