"""What interventions change is measured on the same images under both conditions."""

import math

import pyarrow as pa
import pytest

from mmray.features.hallucination.doses import Condition, dose_rows
from mmray.features.hallucination.neuron_tables import PARTS


def test_an_image_that_one_condition_lacks_is_compared_under_neither() -> None:
    """As where a dose makes the nats of a caption infinite."""
    nats = {(0, "a"): 2.0, (0, "b"): 9.0, (1, "a"): 3.0, (1, "c"): 7.0}
    rows = [
        {"condition": number, "sample_id": image, "image": image, "measure": "perplexity", "sums": [value, 1.0]}
        for (number, image), value in nats.items()
    ]
    observed = pa.Table.from_pylist(rows, PARTS["dosed"])
    every = [Condition("none", None, None, ()), Condition("raised", "scale", 3.0, ("L0.u1",))]
    found = {(row["dose"], row["measure"]): row for row in dose_rows(observed, every, 50, 0)}
    assert found[3.0, "perplexity"]["value"] == pytest.approx(math.exp((3 + 7) / 2))
    relative = found[3.0, "perplexity relative"]
    assert (relative["value"], relative["n"]) == (pytest.approx(math.exp(3 - 2)), 1)
