"""Is a score what ablating the neuron takes? `python -m tests.bench.calibration [--model MODEL] [--samples N]`.

At every noun of some samples the highest neurons by each score are ablated one by one, at all positions, in plain
forwards of the whole network. Printed for each score, over all layers and by layer: predicted / real fall (median and
quartiles, of falls of at least `--least`), the correlation of the two over all pairs of noun and neuron, and their
number. `effect` and its first-order part are compared with the fall of the noun's log-odds, contributions with that of
its logit.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

import mmray
from mmray.models.loading import LoadedModel, load
from mmray.models.norms import token_log_odds, token_logits
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.scoring import ablation_effects, score_captured
from mmray.neurons.token_positions import TokenPosition, positions_of
from tests.bench.localisation import Data, read

REAL = {
    "effect": "log-odds",
    "first order": "log-odds",
    "contribution": "logit",
    "contribution, folded": "logit",
}
"""What each score's prediction is compared with."""


def predictions(model: LoadedModel, batch: Batch, places: Sequence[TokenPosition]) -> dict[str, list[Tensor]]:
    """Return the scores by name, a list entry for each layer."""
    products, captured = gradient_pass(model, batch, places, "effect")
    return {
        "effect": ablation_effects(model, captured, products),
        "first order": products,
        "contribution": score_captured(model, captured, "contribution").scores,
        "contribution, folded": score_captured(model, captured, "contribution", folded=True).scores,
    }


def ends(model: LoadedModel, batch: Batch, places: Sequence[TokenPosition]) -> dict[str, Tensor]:
    """Return each place's log-odds and logit of its token."""
    captured: ActivationCache
    with torch.inference_mode(), cache_activations(model, batch, places) as captured:
        forward(model, batch)
    functions = {"log-odds": token_log_odds, "logit": token_logits}
    return {name: function(model, captured.hidden, captured.tokens).cpu() for name, function in functions.items()}


def pairs(model: LoadedModel, data: Data, count: int, highest: int, batch_size: int = 4) -> pa.Table:
    """Return a row for each place and neuron: its layer, all predictions, and the real falls on ablation."""
    rows = []
    samples = random.Random(0).sample(data.samples, min(count, len(data.samples)))
    for items, batch in data.analysis(model, batch_size).encoded(samples):
        places = positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items])
        layers = np.repeat(np.arange(len(model.widths)), model.widths)
        starts = np.cumsum([0, *model.widths])
        scores = {
            name: torch.cat([part.cpu() for part in found], 1)
            for name, found in predictions(model, batch, places).items()
        }
        before = ends(model, batch, places)
        chosen = {
            number: torch.cat([found[number].topk(highest).indices for found in scores.values()]).unique()
            for number in range(len(places))
        }
        for neuron in sorted({int(neuron) for found in chosen.values() for neuron in found}):
            layer = int(layers[neuron])
            with mmray.ablate(model, [(layer, neuron - int(starts[layer]))]):
                after = ends(model, batch, places)
            rows += [
                {"layer": layer}
                | {name: float(found[number, neuron]) for name, found in scores.items()}
                | {name: float(before[name][number] - after[name][number]) for name in before}
                for number, found in chosen.items()
                if neuron in found
            ]
    return pa.Table.from_pylist(rows)


def calibration(found: pa.Table, score: str, least: float) -> dict[str, float]:
    """Return the median and quartiles of predicted / real, the correlation, and the number of pairs."""
    predicted, real = (found[name].to_numpy() for name in (score, REAL[score]))
    large = np.abs(real) >= least
    quartiles = np.percentile(predicted[large] / real[large], [25, 50, 75]) if large.any() else [np.nan] * 3
    several = len(real) > 2
    return {
        **dict(zip(("low", "median", "high"), map(float, quartiles), strict=True)),
        "correlation": float(np.corrcoef(predicted, real)[0, 1]) if several else np.nan,
        "n": len(real),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--highest", type=int, default=3, help="neurons at each noun, of each score")
    parser.add_argument("--least", type=float, default=0.1, help="smallest real fall whose ratio counts")
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.set_grad_enabled(False)
    model = load(arguments.model)
    found = pairs(model, read(arguments.model, arguments.data), arguments.samples, arguments.highest)
    print(
        f"{arguments.model}: {len(found)} pairs of noun and neuron, the {arguments.highest} highest by each score; "
        f"{time.perf_counter() - began:.0f} s"
    )
    print(f"{'predicted':22s}{'fall of':10s}{'layer':>6s}{'predicted / real':>18s}{'quartiles':>16s}{'r':>7s}{'n':>6s}")
    for score, real in REAL.items():
        for layer in (None, *range(len(model.widths))):
            part = found if layer is None else found.filter(pc.equal(found["layer"], layer))
            if not len(part):
                continue
            one = calibration(part, score, arguments.least)
            names = (score, real, "all") if layer is None else ("", "", f"L{layer}")
            print(
                f"{names[0]:22s}{names[1]:10s}{names[2]:>6s}{one['median']:18.2f}"
                f"{one['low']:9.2f} –{one['high']:5.2f}{one['correlation']:7.2f}{one['n']:6d}"
            )


if __name__ == "__main__":
    main()
