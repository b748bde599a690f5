"""Figures draw the tables' rows; what was not measured is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.errors import InputError
from mmray.runs.run import Run, open_run
from tests.support.dogs import SCENES, dog_run


@pytest.fixture(scope="module")
def dogs(shared: Callable[..., Path]) -> Run:
    return open_run(shared("dogs", dog_run) / "run")


@pytest.mark.parametrize("concept", ["dog", "DOG", None])
def test_layers_are_those_of_the_ten_highest(dogs: Run, concept: str | None) -> None:
    rows = dogs.table("rankings").to_pylist()
    own = [row for row in rows if concept is None or row["concept"] == concept.lower()]
    for trace, rank in zip(dogs.plot_layers(concept).data, ("rank", "specific_rank"), strict=True):
        near = [row["layer"] for row in own if row[rank] <= 10]
        assert list(trace.x) == [f"L{layer}" for layer in range(8)]
        assert list(trace.y) == pytest.approx([near.count(layer) / len(near) for layer in range(8)])


def test_doses_are_the_rows_of_properties(dogs: Run) -> None:
    for concept in (None, "dog"):
        rows = [row for row in dogs.properties(concept).to_pylist() if row["measure"] == "zeroed_own"]
        traces = dogs.plot_dose(concept).data
        assert len(traces) == len({row["method"] for row in rows}) >= 3
        shown = {(x, y) for trace in traces for x, y in zip(trace.x, trace.y, strict=True)}
        assert shown == {(row["neurons"], row["value"]) for row in rows}
        first = traces[0]
        for value, more, less, count in zip(
            first.y, first.error_y.array, first.error_y.arrayminus, first.x, strict=True
        ):
            (row,) = [row for row in rows if (row["method"], row["neurons"]) == ("score", count)]
            assert (value + more, value - less) == pytest.approx((row["high"], row["low"]))


def test_what_was_not_measured_is_said(dogs: Run) -> None:
    with pytest.raises(
        InputError, match=r"no measure 'x' over all concepts by the number of neurons; there are .*zeroed_own"
    ):
        dogs.plot_dose(measure="x")
    with pytest.raises(InputError, match=r"no measure 'zeroed_own' of 'cat' .*; mmray properties RUN measures more"):
        dogs.plot_dose("cat")
    with pytest.raises(InputError, match="no concept 'dgo'"):
        dogs.plot_layers("dgo")


def test_a_table_is_a_data_frame_and_a_run_has_a_length(dogs: Run) -> None:
    frame = dogs.to_pandas("neurons")
    assert list(frame["neuron"]) == dogs.table("neurons")["neuron"].to_pylist()
    assert len(dogs) == dogs.status().samples == SCENES
