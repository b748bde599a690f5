"""Steering sets the neurons it names, at the positions it names, token by token, and leaves the model as it was."""

import numpy as np
import pytest
import torch

from mmray.errors import InputError
from mmray.features.selectivity import steering
from mmray.features.selectivity.selection import Totals
from mmray.features.selectivity.steering import Steer, d_prime, mean_of, means_by_token, steered, steered_captions
from mmray.models.capture import capture_activations
from mmray.models.generation import generate
from mmray.models.prompting import prompt_text
from tests.support.samples import hooks, picture, samples, settings


def steer(everywhere=False):
    values = np.array([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
    return Steer("en", "es", np.array([1, 50]), values, everywhere)


def seen_while(model, plan):
    """Return the two neurons' activations at the last position of each step, and at the first of the prompt."""
    layer, unit = divmod(50, model.widths[0])
    seen = []

    def receive(number, activation, _):
        if number in (0, layer):
            place = 1 if number == 0 else unit
            seen.append((number, activation[:, place].clone()))

    with steered(model, plan, 1), capture_activations(model.network, model.projections, receive):
        generate(model, [prompt_text(model, None, "en")], [picture(1)], longest=5)
    return {0: [a for n, a in seen if n == 0], layer: [a for n, a in seen if n == layer]}


# OPT's MLPs see all positions in one matrix.
@pytest.mark.parametrize("variant", ["llava", "blip2_opt"])
def test_each_token_gets_its_own_values_and_later_ones_the_last(open_model, variant):
    model = open_model(variant)
    assert model.widths[0] <= 50
    seen = seen_while(model, steer())
    first, second = seen.values()
    assert [float(step[-1]) for step in first] == [1.0, 3.0, 5.0, 5.0, 5.0][: len(first)]
    assert [float(step[-1]) for step in second] == [-2.0, 4.0, 6.0, 6.0, 6.0][: len(second)]
    assert (first[0][:-1] != 1.0).all()


def test_all_positions_are_set_where_that_is_asked(open_model):
    first, _ = seen_while(open_model("llava"), steer(everywhere=True)).values()
    assert len(first[0]) > 1
    assert (first[0] == 1.0).all()


def test_the_model_is_left_as_it_was(open_model):
    model = open_model("llava")
    before = hooks(model.network)
    found = samples(2, language="en")
    rows = steered_captions(model, found, steer(), settings(), 2)
    assert hooks(model.network) == before
    again = steered_captions(model, found, steer(), settings(), 2)
    assert rows == again
    assert [row["sample_id"] for row in rows] == ["s0", "s1"]


def test_answers_begin_with_the_census_s_prefix(open_model, monkeypatch):
    model, asked = open_model("llava"), []

    def noted(model, prompts, images):
        asked.extend(prompts)
        return generate(model, prompts, images)

    monkeypatch.setattr(steering, "generate", noted)
    steered_captions(model, samples(1, language="es"), steer(), settings(prefix="Una imagen de"), 2)
    assert asked == [prompt_text(model, None, "es", prefix="Una imagen de")] * 2


def test_a_batch_that_does_not_fit_is_halved(open_model, monkeypatch):
    model, found = open_model("llava"), samples(3, language="en")
    expected = steered_captions(model, found, steer(), settings(), 1)

    def short(model, prompts, images):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, prompts, images)

    monkeypatch.setattr(steering, "generate", short)
    assert steered_captions(model, found, steer(), settings(), 3) == expected


def test_rows_of_one_matrix_are_steered_alike_in_any_batch(open_model):
    model, found = open_model("blip2_opt"), samples(3, language="en")
    one, together = (steered_captions(model, found, steer(), settings(), size) for size in (1, 3))
    assert one == together
    assert any(row["before"] != row["after"] for row in one)


def test_routed_experts_are_refused(open_model):
    model = open_model("qwen3_vl_moe")
    with pytest.raises(InputError, match="--steer"), steered(model, steer(), 1):
        generate(model, [prompt_text(model, None, "en")], [picture(1)], longest=2)


def totals():
    """Two labels; neuron 0 tells them apart, neuron 1 moves within them as much, neuron 2 never moves."""
    course = [
        torch.tensor([[[0.0, 8.0], [4.0, 5.0], [1.0, 1.0]]]),
        torch.tensor([[[0.0, 9.0], [0.0, 0.0], [1.0, 1.0]]]),
    ]
    tokens = torch.tensor([[1.0, 1.0]])
    squares = torch.tensor([[[1.0, 146.0], [40.0, 50.0], [2.0, 2.0]]])
    return {
        "course 00": Totals(course[0].double(), tokens.double()),
        "course 01": Totals(course[1].double(), tokens.double()),
        "spread": Totals(squares.double(), 2 * tokens.double()),
    }


def test_means_and_what_tells_labels_apart():
    assert means_by_token(totals(), 1).tolist() == [[8.0, 5.0, 1.0], [9.0, 0.0, 1.0]]
    assert mean_of(totals(), 0).tolist() == [0.0, 2.0, 1.0]
    apart = d_prime(totals(), 0, 1)
    assert apart.argsort(descending=True).tolist() == [0, 1, 2]
    assert apart[2] == 0
