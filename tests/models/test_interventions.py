"""Changes hold while the block lasts, during generation too, and leave every byte as it was."""

import threading
from contextlib import ExitStack

import pytest
import torch

import mmray
from mmray.errors import InputError
from mmray.models.generation import generate
from mmray.models.interventions import by_layer
from mmray.models.parts import output_rows, set_output_rows
from mmray.models.prompting import prompt_text
from mmray.neurons.scoring import score_batch
from tests.support.samples import CAPTIONS, batch_of, hooks, logits, picture, weights

FAMILIES = ["llava", "qwen3_vl_moe", "blip2_opt", "blip2_t5", "gemma3", "mllama"]
NEURONS = ["L0.u3", "L1.u40", "L0.u0", "L1.u7"]


def write(model):
    return generate(model, [prompt_text(model, None, "en")] * 2, [picture(1), picture(2)], longest=8)


def by_hand(model, factor, value, stack):
    """Have the neurons write factor times what they write, and value times their rows, by weights and outputs alone."""
    for layer, units in by_layer(model, NEURONS).items():
        projection, index = model.projections[layer], torch.tensor(units)
        rows = output_rows(model.network, projection)[index].clone()
        set_output_rows(model.network, projection, index, rows * factor)
        stack.callback(set_output_rows, model.network, projection, index, rows)
        constant = value * rows.sum(0)
        module = model.network.get_submodule(projection.path)
        stack.callback(module.register_forward_hook(lambda *call, constant=constant: call[2] + constant).remove)


CHANGES = {
    "ablate": (lambda model: mmray.ablate(model, NEURONS), 0.0, 0.0),
    "scale": (lambda model: mmray.scale(model, NEURONS, -3.0), -3.0, 0.0),
    "set_to": (lambda model: mmray.set_to(model, NEURONS, 2.5), 0.0, 2.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", FAMILIES)
def test_changes_are_as_if_the_rows_were_changed(open_model, variant, change):
    model = open_model(variant)
    context, factor, value = CHANGES[change]
    plain, before, count = logits(model), weights(model), hooks(model.network)
    with context(model):
        changed, written = logits(model), write(model)
        assert weights(model) == before
    assert weights(model) == before
    assert hooks(model.network) == count
    assert torch.equal(logits(model), plain)
    assert (changed - plain).abs().max() > 1e-3
    with ExitStack() as stack:
        by_hand(model, factor, value, stack)
        torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
        assert write(model) == written


@pytest.mark.parametrize("variant", FAMILIES)
def test_changes_hold_in_every_step_of_generation(open_model, variant):
    model = open_model(variant)
    plain, all_of_last = write(model), [(1, unit) for unit in range(model.widths[1])]
    with mmray.ablate(model, all_of_last):
        ablated = write(model)
    with mmray.scale(model, all_of_last, 1.0):
        assert write(model) == plain
    assert ablated != plain
    assert write(model) == plain


@pytest.mark.parametrize("variant", FAMILIES)
def test_noise_is_in_these_rows_alone_and_taken_back_to_the_byte(open_model, variant):
    model = open_model(variant)
    before, plain = weights(model), logits(model)
    projections = model.projections
    rows = [output_rows(model.network, projection).clone() for projection in projections]
    with mmray.add_noise(model, NEURONS, sigma=0.5, seed=3):
        noisy = [output_rows(model.network, projection).clone() for projection in projections]
        changed = logits(model)
    with mmray.add_noise(model, NEURONS, sigma=0.5, seed=3):
        assert torch.equal(logits(model), changed)
    with mmray.add_noise(model, NEURONS, sigma=0.5, seed=4):
        assert not torch.equal(logits(model), changed)
    assert not torch.equal(plain, changed)
    assert weights(model) == before
    groups = by_layer(model, NEURONS)
    noise = []
    for layer, (old, new) in enumerate(zip(rows, noisy, strict=True)):
        touched = (old != new).any(1).nonzero()[:, 0].tolist()
        assert touched == sorted(groups[layer])
        noise.append((new - old)[touched])
    drawn = torch.cat(noise)
    assert 0.4 < drawn.std() < 0.6
    assert abs(torch.corrcoef(drawn)[0, 1]) < 0.6


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe"])
def test_nested_changes_and_exceptions_leave_nothing(open_model, variant):
    model = open_model(variant)
    before, count, plain = weights(model), hooks(model.network), logits(model)
    with pytest.raises(ZeroDivisionError), mmray.add_noise(model, NEURONS, 0.1), mmray.ablate(model, NEURONS[:2]):
        with mmray.add_noise(model, [*NEURONS, "L0.u9"], 0.2, seed=1), mmray.set_to(model, NEURONS[1:], 1.0):
            assert weights(model) != before
            inner = logits(model)
        assert not torch.equal(inner, logits(model))
        raise ZeroDivisionError
    assert weights(model) == before
    assert hooks(model.network) == count
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("variant", FAMILIES)
def test_nested_changes_are_applied_in_turn(open_model, variant):
    model = open_model(variant)
    with mmray.ablate(model, NEURONS):
        once = logits(model)
        with mmray.ablate(model, NEURONS[1:]), mmray.scale(model, NEURONS, 5.0):
            torch.testing.assert_close(logits(model), once, rtol=1e-4, atol=1e-4)
        with mmray.set_to(model, NEURONS, 2.5):
            inner = logits(model)
    with mmray.set_to(model, NEURONS, 2.5):
        torch.testing.assert_close(logits(model), inner, rtol=1e-4, atol=1e-4)
    with mmray.scale(model, NEURONS, 6.0):
        whole = logits(model)
    with (
        mmray.scale(model, NEURONS[:3], -2.0),
        mmray.scale(model, NEURONS, -3.0),
        mmray.scale(model, NEURONS[3:], -2.0),
    ):
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, once)


@pytest.mark.parametrize("variant", FAMILIES)
def test_scores_are_those_of_the_changed_neurons(open_model, variant):
    model, (batch, places) = open_model(variant), batch_of(open_model(variant), CAPTIONS[:3])
    layer, units = 1, list(range(0, model.widths[1], 3))
    neurons = [(layer, unit) for unit in units]
    plain = score_batch(model, batch, places).scores[layer][:, units]
    with mmray.scale(model, neurons, -2.0):
        torch.testing.assert_close(score_batch(model, batch, places).scores[layer][:, units], -2 * plain)
        with mmray.ablate(model, neurons):
            assert not score_batch(model, batch, places).scores[layer][:, units].any()
    assert plain.any()


def test_another_model_is_untouched(open_model, tiny):
    model, other = open_model("llava"), mmray.load_model(str(tiny("llava")))
    plain = logits(other)
    with mmray.add_noise(model, NEURONS, 0.5), mmray.ablate(model, ["L1.u1"]):
        assert torch.equal(logits(other), plain)
        assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe"])
def test_a_neuron_named_twice_is_changed_once(open_model, variant):
    model = open_model(variant)
    neuron = next(f"L1.u{unit}" for unit in range(model.widths[1]) if moves(model, unit))
    with mmray.scale(model, [neuron], 3.0):
        once = logits(model)
    with mmray.scale(model, [neuron, (1, int(neuron.partition("u")[2])), neuron], 3.0):
        assert torch.equal(logits(model), once)


def moves(model, unit):
    plain = logits(model)
    with mmray.scale(model, [(1, unit)], 3.0):
        return not torch.equal(logits(model), plain)


@pytest.mark.parametrize("neuron", ["L2.u0", "L0.u48", "L-1.u0", "dog", "L1", "l1.u2", "", (0, -1), (2, 0)])
def test_a_neuron_that_is_not_there_is_named_in_one_line(open_model, neuron):
    model = open_model("llava")
    before = hooks(model.network)
    for change in (mmray.ablate, lambda m, n: mmray.add_noise(m, n, 0.5), lambda m, n: mmray.scale(m, n, 2.0)):
        with pytest.raises(InputError) as refusal, change(model, ["L0.u0", neuron]):
            pass
        assert "\n" not in str(refusal.value)
        assert (neuron if isinstance(neuron, str) else f"L{neuron[0]}.u{neuron[1]}") in str(refusal.value)
    assert hooks(model.network) == before


def test_a_model_that_another_thread_runs_meanwhile_is_untouched(open_model, tiny):
    model, other = open_model("llava"), mmray.load_model(str(tiny("llava")))
    plain, seen, begun, done = logits(other), [], threading.Event(), threading.Event()

    def run():
        while not done.is_set():
            seen.append(torch.equal(logits(other), plain))
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            begun.clear()
            with mmray.add_noise(model, NEURONS, 0.5), mmray.scale(model, NEURONS, 3.0):
                assert not torch.equal(logits(model), plain)
                assert begun.wait(60)
    finally:
        done.set()
        thread.join()
    assert len(seen) >= 5
    assert all(seen)


@pytest.mark.parametrize("variant", ["llava", "blip2_opt", "gemma3"])
def test_at_the_last_position_alone_only_its_prediction_changes(open_model, variant):
    """Rows are as long as each other here, so that the last position of a forward is the last of every row."""
    model = open_model(variant)
    batch, _ = batch_of(model, [CAPTIONS[0]] * 2)
    neurons, values = [(0, 3), (1, 7)], [2.0, -3.0]

    def read():
        with torch.inference_mode():
            return model.network(**batch.to(model.device, model.network.dtype), use_cache=False).logits

    plain = read()
    with mmray.set_to(model, neurons, values, last=True):
        changed = read()
    assert torch.equal(changed[:, :-1], plain[:, :-1])
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-3
    # One value per neuron is each one's own change.
    with mmray.set_to(model, neurons[:1], 2.0, last=True), mmray.set_to(model, neurons[1:], -3.0, last=True):
        torch.testing.assert_close(read(), changed)
    with mmray.scale(model, neurons, 1.0, last=True):
        torch.testing.assert_close(read(), plain)


def test_experts_see_no_positions(open_model):
    with (
        pytest.raises(InputError, match="last position alone"),
        mmray.scale(open_model("qwen3_vl_moe"), NEURONS, 0.0, last=True),
    ):
        pass
