"""The rows that an analysis adds to a run's tables, from its selection and from the parts of its tests."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from mmray.features.selectivity.masks import RANDOM, Mask, locate_neurons
from mmray.features.selectivity.reply_language import LabelClassifier
from mmray.features.selectivity.selection import LabelSelection
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.steering import Steer
from mmray.features.selectivity.tables import TABLES
from mmray.neuron_names import NeuronNames
from mmray.objects.answer_scores import BEGINS, answer_score
from mmray.statistics.bootstrap import Value, measure

SHOWN_TOKENS = 10

Key = tuple[str | None, str | None, str | None]
"""Module, label and control of the zeroed neurons; three times None without a mask."""
UNMASKED: Key = (None, None, None)
Analyses = Mapping[str, Mapping[str, str]]
"""Module → columns of ANALYSIS of its rows."""


def neuron_rows(
    selection: LabelSelection,
    labels: Sequence[str],
    widths: Sequence[int],
    names: NeuronNames,
    analysis: Mapping[str, str],
) -> pa.Table:
    """Return one row of `selectivity` per label and neuron; `analysis` has the columns of ANALYSIS."""
    scores = dict(zip(selection.chosen.neurons.tolist(), selection.chosen.score.tolist(), strict=True))
    rows = []
    for number, label in enumerate(labels):
        own = selection.chosen.of(number).tolist()
        for rank, (neuron, (layer, unit)) in enumerate(zip(own, locate_neurons(own, widths), strict=True), 1):
            rows.append(
                {
                    **analysis,
                    "label": label,
                    "rank": rank,
                    "layer": layer,
                    "unit": unit,
                    "neuron": names.name(layer, unit),
                    "score": scores[neuron],
                    "amount": float(selection.amount[neuron, number]),
                    "magnitude_entropy": float(selection.magnitude_entropy[neuron]),
                    "p_value": None if selection.p_value is None else float(selection.p_value[neuron]),
                    "stability": None if selection.stability is None else float(selection.stability[neuron, number]),
                }
            )
    return pa.Table.from_pylist(rows, schema=TABLES["selectivity"])


def label_rows(
    selection: LabelSelection,
    labels: Sequence[str],
    samples: Mapping[str, int],
    widths: Sequence[int],
    analysis: Mapping[str, str],
) -> pa.Table:
    """Return one row of `selective_labels` per label; `samples` counts those that the selection saw."""
    starts = np.cumsum([0, *widths])
    union = int(selection.chosen.member.any(dim=1).sum())
    rows = []
    for number, label in enumerate(labels):
        own = selection.chosen.of(number).numpy()
        rows.append(
            {
                **analysis,
                "label": label,
                "samples": samples[label],
                "tokens": int(selection.tokens[number]),
                "neurons": len(own),
                "union": union,
                # JSON has no NaN.
                "cut": None if selection.cut[number].isnan() else float(selection.cut[number]),
                "chance": None if selection.chance is None else float(selection.chance[number]),
                "stability": None if selection.overlap is None else float(selection.overlap[number]),
                # Layers are the bins of the neurons' indices.
                "layers": np.histogram(own, starts)[0].tolist(),
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["selective_labels"])


def intervention_rows(
    parts: Iterable[pa.Table],
    masks: Sequence[Mask],
    images: Mapping[str, str],
    settings: SelectivitySettings,
    analyses: Analyses,
) -> pa.Table:
    """Return one row of `interventions` per mask, label and measure, with the interval of the change over images.

    `images` maps samples to keys of their images.
    """
    sums: dict[tuple[str, str], dict[Key, dict[str, tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for part in parts:
        for row in part.to_pylist():
            key = (row["module"], row["masked"], row["control"])
            sums[row["label"], row["measure"]][key][row["sample_id"]] = (row["total"], row["count"])
    rows = []
    for (label, name), by_mask in sorted(sums.items()):
        untouched = by_mask[UNMASKED]
        protocol = protocol_of(name, label, settings)
        samples = sorted(untouched)
        image = np.unique([images.get(sample, sample) for sample in samples], return_inverse=True)[1]
        before = np.array([untouched[sample] for sample in samples])
        for mask in masks:
            changed = by_mask[mask.module, mask.label, mask.control]
            after = np.array([changed[sample] for sample in samples])
            # The interval is that of the paired change: both totals, over the same count.
            both = _summed(np.stack([before[:, 0], after[:, 0], before[:, 1]], axis=1), image)
            base = float(before[:, 0].sum()) / float(before[:, 1].sum())
            values: dict[str, tuple[float, Value]] = {name: (base, _change)}
            if name == "nll":
                values["perplexity"] = (math.exp(base), _perplexity_change)
            for shown, (unmasked, change) in values.items():
                found = measure(both, both, change)
                rows.append(
                    {
                        **analyses[mask.module],
                        "masked": mask.label,
                        "control": mask.control,
                        "neurons": len(mask.neurons),
                        "label": label,
                        "measure": shown,
                        "protocol": protocol,
                        "before": unmasked,
                        "after": unmasked + (found.after or 0.0),
                        "change": found.after,
                        "low": found.low,
                        "high": found.high,
                        "n": len(samples),
                    }
                )
    return pa.Table.from_pylist(rows, schema=TABLES["interventions"])


def protocol_of(measure: str, label: str, settings: SelectivitySettings) -> str:
    """Return how a measure of a label's samples is taken."""
    if measure == "nll":
        return "held-out texts, teacher-forced, mean over tokens"
    name = settings.score_of(label)
    written = "" if name == BEGINS else f"; greedy, at most {settings.longest} tokens"
    return f"held-out questions: {answer_score(name).definition}{written}"


def answer_rows(parts: Iterable[pa.Table], analyses: Analyses) -> pa.Table:
    """Return one row of `masked_answers` per question and mask; unmasked replies belong to every analysis."""
    rows = [
        {**analyses[module]} | {name: value for name, value in row.items() if name != "module"}
        for part in parts
        for row in part.to_pylist()
        for module in ([row["module"]] if row["module"] else analyses)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["masked_answers"])


def _change(totals: Float[ndarray, "draw 3"]) -> Float[ndarray, " draw"]:
    """Return what the mask adds per token, from totals without and with it and their count."""
    added: Float[ndarray, " draw"] = (totals[:, 1] - totals[:, 0]) / totals[:, 2]
    return added


def _perplexity_change(totals: Float[ndarray, "draw 3"]) -> Float[ndarray, " draw"]:
    """Return by how much the mask raises the perplexity: exp of the mean negative log-likelihood per token."""
    with np.errstate(over="ignore", invalid="ignore"):
        rise: Float[ndarray, " draw"] = np.exp(totals[:, 1] / totals[:, 2]) - np.exp(totals[:, 0] / totals[:, 2])
    return rise


def _summed(values: Float[ndarray, "sample sum"], image: Int[ndarray, " sample"]) -> Float[ndarray, "image sum"]:
    """Return sums per image or long text, because its samples are not independent."""
    total = np.zeros((image.max() + 1, values.shape[1]))
    np.add.at(total, image, values)
    return total


def stage_rows(parts: Iterable[pa.Table], analyses: Analyses) -> pa.Table:
    """Return one row of `stages` per mask, layer and kind of position; unmasked ones belong to every analysis."""
    sums: dict[tuple[str, str, str, str, int], np.ndarray] = {}
    tokens: dict[tuple[str, str, str, str, int], Counter[str]] = defaultdict(Counter)
    for part in parts:
        for row in part.to_pylist():
            # Blank, not null, so that keys can be sorted.
            mask = (row["module"] or "", row["masked"] or "", row["control"] or "")
            key = (*mask, row["position"], row["layer"])
            values = np.array([row[name] for name in ("n_tokens", "entropy", "agreed", "shift")], float)
            sums[key] = sums.get(key, np.zeros(4)) + values
            for token, count in zip(row["tokens"], row["counts"], strict=True):
                tokens[key][token] += count
    rows = []
    keys = [(module, key) for key in sorted(sums) for module in ([key[0]] if key[0] else analyses)]
    for module, key in keys:
        count, entropy, agreed, shift = sums[key].tolist()
        # Each unit commits its 50 top tokens only, so counts of rarer tokens are lower bounds.
        frequent = tokens[key].most_common(SHOWN_TOKENS)
        # Under random masks, the lens is not read.
        read = key[2] != RANDOM
        rows.append(
            {
                **analyses[module],
                "masked": key[1] or None,
                "control": key[2] or None,
                "position": key[3],
                "layer": key[4],
                "n_tokens": int(count),
                "entropy": entropy / count if read else None,
                "agreement": agreed / count if read else None,
                "shift": shift / count,
                "tokens": [token for token, _ in frequent],
                "shares": [number / count for _, number in frequent],
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["stages"])


def steering_rows(
    parts: Iterable[pa.Table],
    steer: Steer,
    settings: SelectivitySettings,
    classifier: LabelClassifier,
    analysis: Mapping[str, str],
) -> pa.Table:
    """Return one row of `steering` per caption, with the labels that it and its steered version read like."""
    where = "all positions" if steer.everywhere else "the answer's positions"
    means = "mean at that token of an answer" if settings.steer_values == "course" else "mean over answers"
    described = f"{settings.steer_neurons} neurons set to {settings.steer_factor:g} × their {means}, at {where}"
    rows = [
        {
            **analysis,
            "source": steer.source,
            "target": steer.target,
            "steering": described,
            "neurons": len(steer.neurons),
            **reply,
            "label_before": classifier.label(reply["before"]),
            "label_after": classifier.label(reply["after"]),
            "words_before": classifier.share(reply["before"], steer.target),
            "words_after": classifier.share(reply["after"], steer.target),
        }
        for part in parts
        for reply in part.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["steering"])
