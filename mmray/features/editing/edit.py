"""Edits as values: what is added to which neurons' rows of W_out, and to the rows that they read; purpose and model.

EDIT/edit.json           purposes, method and its settings, model digest, cost, and the checksum of its rows
EDIT/edit.safetensors    layer [row], unit [row], delta [row, hidden]; inputs [row, part, hidden]: of what neurons read
EDIT/README.md           model card
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
from mmray.features.editing.card import edit_card
from mmray.features.editing.files import CAPTIONS_FILE, CARD_FILE, EVALUATION_FILE, FACTS_FILE, ROWS_FILE
from mmray.features.editing.settings import EditSettings
from mmray.models.interventions import changed_inputs, changed_rows
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows
from mmray.neuron_names import PLAIN
from mmray.storage import Checksum, open_store


@dataclass(frozen=True)
class Purpose:
    """What an edit was made for."""

    kind: str
    """swap, suppress, hallucination or noise."""
    source: str | None = None
    """The concept to remove from what the model says."""
    target: str | None = None
    """What the model should say instead."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Of a hallucination edit: an object in the image, and the word that the model claims with it."""
    language: str | None = "en"
    samples: tuple[str, ...] = ()
    """The samples that the edit was made on. Evaluation counts others as generality."""
    images: tuple[str, ...] = ()
    """The digests of their images, which identify them in other data; edits of older versions have none."""

    @property
    def unwanted(self) -> tuple[str, ...]:
        """The words that the model should no longer say, or only where they are right."""
        return (self.source,) if self.source else tuple(dict.fromkeys(word for _, word in self.pairs))

    @property
    def summary(self) -> str:
        """What the edit is for, in a few words."""
        if self.kind == "hallucination":
            return "hallucination of " + ", ".join(self.unwanted)
        return f"{self.source} → {self.target}"


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Rows to add to W_out: one per neuron, each neuron once."""

    layer: Int[Tensor, " row"]
    unit: Int[Tensor, " row"]
    delta: Float[Tensor, "row hidden"]
    purposes: tuple[Purpose, ...]
    model: str
    """Digest of the checkpoint that the edit fits."""
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """The cost: seconds, rows and parameters changed, bytes, norm."""
    inputs: Float[Tensor, "row part hidden"] | None = None
    """What is added to the rows that these neurons read, the gate's first (`MlpInputs`); None: they stay."""

    def __repr__(self) -> str:
        """Return what the edit is for, and its size."""
        purposes = "; ".join(purpose.summary for purpose in self.purposes)
        layers = ", ".join(f"L{layer}" for layer in sorted(set(self.layer.tolist())))
        return (
            f"WeightEdit {purposes}: {len(self.delta)} rows of W_out in {layers}, norm {float(self.delta.norm()):.3g}"
        )

    @property
    def purpose(self) -> Purpose:
        """The first purpose; most edits have only one."""
        return self.purposes[0]

    @cached_property
    def neurons(self) -> list[str]:
        """The edited neurons by name."""
        # Without experts, which need the model's shape; such names are read as well.
        return [PLAIN.name(*pair) for pair in zip(self.layer.tolist(), self.unit.tolist(), strict=True)]

    def check(self, model: LoadedModel) -> None:
        """Raise InputError unless the edit was made on this model."""
        if model.digest != self.model:
            raise InputError(
                f"the edit was made on another model (digest {self.model}); {model.name} has {model.digest}"
            )

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Add the rows to the model's weights inside the block; the weights are byte-equal afterwards.

        Raises InputError if the edit was made on another model, or changes what neurons read and the model's weights
        are quantised.
        """
        self.check(model)
        with ExitStack() as stack:
            # One layer at a time: a model may span several devices.
            for layer in sorted(set(self.layer.tolist())):
                chosen = self.layer == layer
                units, rows = self.unit[chosen], output_rows(model.network, model.projections[layer])
                before = rows[units.to(rows.device)]
                # Added in fp32: a small delta can vanish in a sum of half-precision numbers.
                after = (before.float() + self.delta[chosen].to(before.device)).to(before.dtype)
                stack.enter_context(changed_rows(model, layer, units.tolist(), after))
                if self.inputs is not None:
                    stack.enter_context(changed_inputs(model, layer, units, self.inputs[chosen]))
            yield

    def __add__(self, other: WeightEdit) -> WeightEdit:
        """Return both edits as one; the rows of a neuron that both change add up.

        Raises InputError for edits of two models, and where one rewrites what a neuron of the other reads.
        """
        if self.model != other.model:
            raise InputError(f"edits of two models ({self.model} and {other.model}) can't be added")
        if shared := self._rewritten & set(other.neurons) | other._rewritten & set(self.neurons):
            raise InputError(
                f"both edits change {min(shared)}, and one of them what it reads, so they can't be added; "
                "make one edit of both"
            )
        pairs = torch.stack([torch.cat([self.layer, other.layer]), torch.cat([self.unit, other.unit])], dim=1)
        # A neuron of both edits gets one row, the sum of its two.
        unique, index = torch.unique(pairs, dim=0, return_inverse=True)
        rows = torch.cat([self.delta, other.delta])
        delta = torch.zeros(len(unique), rows.shape[1]).index_add_(0, index, rows)
        inputs = None
        for edit, numbers in ((self, index[: len(self.delta)]), (other, index[len(self.delta) :])):
            if edit.inputs is not None:
                inputs = torch.zeros(len(unique), *edit.inputs.shape[1:]) if inputs is None else inputs
                inputs.index_add_(0, numbers, edit.inputs)
        return replace(
            self,
            layer=unique[:, 0],
            unit=unique[:, 1],
            delta=delta,
            purposes=self.purposes + other.purposes,
            settings={"sum": [self.settings, other.settings]},
            facts=cost(delta, self.facts.get("seconds", 0.0) + other.facts.get("seconds", 0.0), inputs),
            inputs=inputs,
        )

    @property
    def _rewritten(self) -> set[str]:
        """The neurons that read something else after the edit."""
        changed = [] if self.inputs is None else self.inputs.flatten(1).any(1).tolist()
        return {name for name, one in zip(self.neurons, changed, strict=False) if one}

    def save(self, uri: str | Path) -> None:
        """Write the edit to a folder, local or s3://. It replaces an earlier edit there, and that one's evaluation."""
        store = open_store(uri)
        # First, so that a crash can't leave old facts, or the evaluation of another edit, next to new rows.
        for name in (FACTS_FILE, EVALUATION_FILE, CAPTIONS_FILE):
            store.delete(name)
        # safetensors refuses tensors that share memory or are not contiguous.
        names = ("layer", "unit", "delta", *(["inputs"] if self.inputs is not None else []))
        data = save({name: getattr(self, name).clone().contiguous() for name in names})
        store.put(ROWS_FILE, data)
        store.put(CARD_FILE, edit_card(self).encode())
        facts = {
            "rows": asdict(Checksum.of(data, len(self.delta))),
            "model": self.model,
            "purposes": [asdict(purpose) for purpose in self.purposes],
            "settings": self.settings,
            "facts": self.facts,
        }
        # Last: an edit is there if edit.json is, so a crash before this leaves none.
        store.put(FACTS_FILE, json.dumps(facts, indent=1, ensure_ascii=False).encode())


def check_free(uri: str, requests: Sequence[EditSettings], run: str | None = None) -> None:
    """Raise InputError if the folder holds an edit with other settings than these, or of another `run`, if given.

    One that is damaged may be made again in its place.
    """
    try:
        facts = json.loads(open_store(uri).read(FACTS_FILE))
        made_with, made_for = facts["settings"], _purpose(facts["purposes"][0]).summary
        # The key of edits that are already on disk: another one would make them all look foreign.
        same = made_with.get("wishes") == [request.model_dump() for request in requests]
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{uri}/{FACTS_FILE}: can't be read ({error}); remove it, or give another folder") from error
    if not same:
        raise InputError(f"{uri}: holds an edit with other settings ({made_for}); give this one another folder")
    if run is not None and made_with.get("run", run) != run:
        raise InputError(f"{uri}: holds an edit of another run, {made_with['run']}; give this one another folder")


def cost(
    delta: Float[Tensor, "row hidden"], seconds: float, inputs: Float[Tensor, "row part hidden"] | None = None
) -> dict[str, Any]:
    """Return the cost of an edit: seconds, rows and parameters changed, bytes, and the L2 norm of W_out's change."""
    parameters = delta.numel() + (0 if inputs is None else inputs.numel())
    return {
        "seconds": round(seconds, 2),
        "rows_changed": len(delta),
        "parameters_changed": parameters,
        "bytes": parameters * delta.element_size(),
        "norm": round(float(delta.norm()), 4),
    }


def open_edit(uri: str | Path) -> WeightEdit:
    """Open an edit; raises InputError if there is none, or it is damaged."""
    store = open_store(uri)
    try:
        facts = json.loads(store.read(FACTS_FILE))
        data = store.read(ROWS_FILE)
        # Edits of earlier versions have no checksum of their rows.
        if "rows" in facts:
            Checksum(**facts["rows"]).check(data)
        rows = load(data)
        purposes = tuple(_purpose(facts) for facts in facts["purposes"])
        return WeightEdit(
            rows["layer"],
            rows["unit"],
            rows["delta"],
            purposes,
            facts["model"],
            facts["settings"],
            facts["facts"],
            rows.get("inputs"),
        )
    except DamagedError as error:
        raise InputError(f"{uri}/{ROWS_FILE}: damaged ({error}); make the edit again") from error
    except FileNotFoundError as error:
        raise InputError(f"{uri}: no edit here (no {FACTS_FILE}); give a folder that mmray edit wrote") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{uri}: not an edit, or a damaged one ({type(error).__name__}: {error})") from error


def _purpose(facts: dict[str, Any]) -> Purpose:
    # JSON has lists where a purpose has tuples.
    pairs = tuple((str(context), str(word)) for context, word in facts["pairs"])
    samples, images = tuple(facts["samples"]), tuple(facts.get("images", ()))
    return Purpose(**facts | {"pairs": pairs, "samples": samples, "images": images})
