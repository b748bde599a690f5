"""Edits as values: what is added to which neurons' rows of W_out, what for, and of which model.

EDIT/edit.json           purposes, method and its settings, model digest, cost, and which rows are its own
EDIT/edit.safetensors    layer [row], unit [row], delta [row, hidden]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mmray.errors import DamagedError, InputError
from mmray.features.editing.files import CAPTIONS_FILE, EVALUATION_FILE
from mmray.features.editing.settings import EditSettings
from mmray.models.interventions import changed_rows
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows
from mmray.neuron_names import neuron_name
from mmray.storage import Checksum, open_store

FACTS, ROWS = "edit.json", "edit.safetensors"


@dataclass(frozen=True)
class Purpose:
    """What an edit is made for."""

    kind: str
    """swap, suppress, hallucination or noise."""
    source: str | None = None
    """The concept that is to vanish from what the model says."""
    target: str | None = None
    """What it is to say instead."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Of a hallucination edit: what is seen, and the word that the model claims with it."""
    language: str | None = "en"
    samples: tuple[str, ...] = ()
    """The samples that the edit was made on; others show how far it generalises."""
    images: tuple[str, ...] = ()
    """The digests of their images, by which other data is told apart; edits of older versions have none."""

    @property
    def unwanted(self) -> tuple[str, ...]:
        """The words that are to be said no more, or only where they are right."""
        return (self.source,) if self.source else tuple(dict.fromkeys(word for _, word in self.pairs))

    @property
    def wish(self) -> str:
        """What the edit is for, in short."""
        if self.kind == "hallucination":
            return "hallucination of " + ", ".join(self.unwanted)
        return f"{self.source} → {self.target}"


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Rows that are added to W_out: one a neuron, each neuron once."""

    layer: Int[Tensor, " row"]
    unit: Int[Tensor, " row"]
    delta: Float[Tensor, "row hidden"]
    purposes: tuple[Purpose, ...]
    model: str
    """Digest of the checkpoint that the edit fits."""
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Cost and course: seconds, parameters changed, memory, steps."""

    @property
    def purpose(self) -> Purpose:
        """The first purpose, of most edits the only one."""
        return self.purposes[0]

    @cached_property
    def neurons(self) -> list[str]:
        """The edited neurons by name."""
        return [neuron_name(*pair) for pair in zip(self.layer.tolist(), self.unit.tolist(), strict=True)]

    def check(self, model: LoadedModel) -> None:
        """Raise InputError unless the edit was made on this very model."""
        if model.digest != self.model:
            raise InputError(
                f"the edit was made on another model (digest {self.model}); {model.name} has {model.digest}"
            )

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Add the rows to the model's weights while the block lasts; they are byte-equal afterwards.

        Raises InputError for another model than the edit's own.
        """
        self.check(model)
        with ExitStack() as stack:
            for layer in sorted(set(self.layer.tolist())):
                chosen = self.layer == layer
                units, rows = self.unit[chosen], output_rows(model.network, model.projections[layer])
                before = rows[units.to(rows.device)]
                # Added in fp32, whatever the model's number format.
                after = (before.float() + self.delta[chosen].to(before.device)).to(before.dtype)
                stack.enter_context(changed_rows(model, layer, units.tolist(), after))
            yield

    def __add__(self, other: WeightEdit) -> WeightEdit:
        """Return both edits in one; of a neuron that both change, the rows add up."""
        if self.model != other.model:
            raise InputError(f"edits of two models ({self.model} and {other.model}) can't be added")
        pairs = torch.stack([torch.cat([self.layer, other.layer]), torch.cat([self.unit, other.unit])], dim=1)
        unique, index = torch.unique(pairs, dim=0, return_inverse=True)
        rows = torch.cat([self.delta, other.delta])
        delta = torch.zeros(len(unique), rows.shape[1]).index_add_(0, index, rows)
        return replace(
            self,
            layer=unique[:, 0],
            unit=unique[:, 1],
            delta=delta,
            purposes=self.purposes + other.purposes,
            settings={"sum": [self.settings, other.settings]},
            facts=cost(delta, self.facts.get("seconds", 0.0) + other.facts.get("seconds", 0.0)),
        )

    def save(self, uri: str | Path) -> None:
        """Write the edit to a folder, local or s3://; edit.json comes last, so that it tells a whole edit.

        An edit that was there before goes, and what was measured of it.
        """
        store = open_store(uri)
        for name in (FACTS, EVALUATION_FILE, CAPTIONS_FILE):
            store.delete(name)
        rows = {name: getattr(self, name).clone().contiguous() for name in ("layer", "unit", "delta")}
        data = save(rows)
        store.put(ROWS, data)
        facts = {
            "rows": asdict(Checksum.of(data, len(self.delta))),
            "model": self.model,
            "purposes": [asdict(purpose) for purpose in self.purposes],
            "settings": self.settings,
            "facts": self.facts,
        }
        store.put(FACTS, json.dumps(facts, indent=1, ensure_ascii=False).encode())


def check_free(uri: str, wishes: Sequence[EditSettings]) -> None:
    """Raise InputError if another edit lies in a folder than the one for these wishes."""
    if not open_store(uri).exists(FACTS):
        return
    before = open_edit(uri)
    if before.settings.get("wishes") != [wish.model_dump() for wish in wishes]:
        raise InputError(
            f"{uri}: holds an edit with other settings ({before.purpose.wish}); give this one another folder"
        )


def cost(delta: Float[Tensor, "row hidden"], seconds: float) -> dict[str, Any]:
    """Return what an edit costs: seconds, rows and parameters changed, bytes of the edit, and its size (L2 norm)."""
    return {
        "seconds": round(seconds, 2),
        "rows_changed": len(delta),
        "parameters_changed": delta.numel(),
        "bytes": delta.numel() * delta.element_size(),
        "norm": round(float(delta.norm()), 4),
    }


def open_edit(uri: str | Path) -> WeightEdit:
    """Open an edit; raises InputError where there is none, or what is there is damaged."""
    store = open_store(uri)
    try:
        facts = json.loads(store.read(FACTS))
        data = store.read(ROWS)
        # Edits of earlier versions do not say which rows are theirs.
        if "rows" in facts:
            Checksum(**facts["rows"]).check(data)
        rows = load(data)
        purposes = tuple(_purpose(facts) for facts in facts["purposes"])
        return WeightEdit(
            rows["layer"], rows["unit"], rows["delta"], purposes, facts["model"], facts["settings"], facts["facts"]
        )
    except DamagedError as error:
        raise InputError(f"{uri}/{ROWS}: damaged ({error}); make the edit again") from error
    except FileNotFoundError as error:
        raise InputError(f"{uri}: no edit here (no {FACTS}); give a folder that mmray edit wrote") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{uri}: not an edit, or a damaged one ({type(error).__name__}: {error})") from error


def _purpose(facts: dict[str, Any]) -> Purpose:
    pairs = tuple((str(seen), str(claimed)) for seen, claimed in facts["pairs"])
    return Purpose(
        **facts | {"pairs": pairs, "samples": tuple(facts["samples"]), "images": tuple(facts.get("images", ()))}
    )
