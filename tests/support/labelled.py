"""Tables of `mmray selectivity` made by rule: two labels, one of which looks like markup, in two analyses."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from mmray.features.selectivity.tables import TABLES
from tests.support.local_jobs import write_table

LABELS = ("en", "<b>%{x}</b>")
LAYERS = 3
LANGUAGE = {"label_kind": "language", "method": "contribution", "module": "language", "modality": "text"}
DOMAIN = {"label_kind": "domain", "method": "lape", "module": "vision", "modality": "image"}
TOGETHER = DOMAIN | {"module": "all", "modality": "all"}
EFFECTS = {"selected": 2.0, "random": 0.01, "shuffled": 0.02}


def add_labels(run: Path) -> None:
    """Add the tables to a run: everything by language; by domain a module's neurons, and answers with them zeroed."""
    rows = {
        "selectivity": [*_neurons(LANGUAGE), *_neurons(DOMAIN)],
        "selective_labels": [*_labels(LANGUAGE), *_labels(DOMAIN)],
        "interventions": _interventions() + _answers(DOMAIN) + _answers(TOGETHER),
        "masked_answers": _masked_answers(),
        "steering": _steering(),
        "stages": _stages(),
    }
    for name, found in rows.items():
        write_table(run, name, pa.Table.from_pylist(found, schema=TABLES[name]))


def _neurons(facts: dict[str, str]) -> list[dict[str, Any]]:
    # Written worst first: readers go by the rank.
    return [
        {
            **facts,
            "label": label,
            "rank": rank,
            "layer": rank % LAYERS,
            "unit": rank,
            "neuron": f"L{rank % LAYERS}.u{rank}",
        }
        for label in LABELS
        for rank in range(12, 0, -1)
    ]


def _labels(facts: dict[str, str]) -> list[dict[str, Any]]:
    counts = {"samples": 5, "tokens": 50, "neurons": 12, "union": 24, "layers": [4, 4, 4]}
    measures = {"cut": 0.5, "chance": float("nan"), "stability": 0.25}
    return [{**facts, "label": label, **counts, **measures} for label in LABELS]


def _interventions() -> list[dict[str, Any]]:
    rows = []
    for measure, sign in (("accuracy", -0.1), ("nll", 1.0)):
        for label in reversed(LABELS):
            for masked in LABELS:
                for control, size in EFFECTS.items():
                    change = sign * size * (1.0 if masked == label else 0.1)
                    numbers = {"before": 1.0, "after": 1 + change, "change": change}
                    bounds = {"low": change - 0.1, "high": change + 0.1, "n": 5, "neurons": 12}
                    named = {"masked": masked, "control": control, "label": label, "measure": measure}
                    rows.append({**LANGUAGE, **named, **numbers, **bounds})
    return rows


def _answers(facts: dict[str, str]) -> list[dict[str, Any]]:
    numbers = {"before": 0.5, "after": 0.25, "change": -0.25, "low": -0.5, "high": -0.125, "n": 12, "neurons": 3}
    return [
        {**facts, **numbers, "masked": masked, "control": control, "label": label, "measure": "accuracy"}
        | {"protocol": f"scored for {number}"}
        for masked in LABELS
        for control in EFFECTS
        for number, label in enumerate(LABELS)
    ]


def _masked_answers() -> list[dict[str, Any]]:
    asked = {**TOGETHER, "label": LABELS[1], "sample_id": "s0", "question": "<b>What?</b>"}
    return [
        asked | {"masked": None, "control": None, "reply": "Yes", "score": 1.0},
        asked | {"masked": LABELS[1], "control": "selected", "reply": "<i>No</i>", "score": 0.0},
        # Another label's mask, and a control: not shown.
        asked | {"masked": LABELS[0], "control": "selected", "reply": "Maybe", "score": 0.0},
        asked | {"masked": LABELS[1], "control": "random", "reply": "Never", "score": 0.0},
    ]


def _steering() -> list[dict[str, Any]]:
    source, target = LABELS
    return [
        {
            **LANGUAGE,
            **{"source": source, "target": target, "steering": "chosen neurons set", "neurons": 24},
            **{"sample_id": f"s{at}", "before": f"a dog {at}", "after": f"<i>{at}</i>"},
            **{"label_before": source, "label_after": target if at % 20 else None, "words_after": float(at % 2)},
        }
        for at in range(40)
    ]


def _stages() -> list[dict[str, Any]]:
    return [
        {
            **LANGUAGE,
            **{"masked": masked, "layer": layer, "position": position, "n_tokens": 9},
            **{"entropy": 3.0 - layer, "agreement": layer / (LAYERS - 1), "shift": 0.1 * layer if masked else 0.0},
            **{"tokens": ["</script>", "dog", "a", "b", "c", "d"], "shares": [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]},
        }
        for masked in (None, *LABELS)
        for position in ("image", "text")
        for layer in range(LAYERS)
    ]
