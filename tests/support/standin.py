"""Edits that need no learning: nothing at all, words that change places in the unembedding, neurons scaled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import mmray
from mmray.features.editing.edit import WeightEdit
from mmray.models.loading import digest


@dataclass(frozen=True)
class Purpose:
    kind: str = "swap"
    source: str | None = None
    target: str | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    language: str | None = "en"
    samples: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class StandIn:
    """`exchange`: the model writes the one word where it would have written the other; `scale`: all of a layer's
    activations by a factor; `ban`: generation may not write the word."""

    purposes: tuple[Purpose, ...]
    exchange: tuple[str, str] | None = None
    scale: tuple[int, float] | None = None
    ban: str | None = None
    facts: dict[str, Any] = field(default_factory=lambda: {"method": "stand-in", "seconds": 0.0, "parameters": 0})

    def applied(self, model: Any) -> Any:
        if self.exchange is not None:
            return exchanged(model, *self.exchange)
        if self.scale is not None:
            layer, factor = self.scale
            return mmray.scale(model, [(layer, unit) for unit in range(model.widths[layer])], factor)
        return banned(model, self.ban) if self.ban is not None else nullcontext()

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "edit.json").write_text(json.dumps(asdict(self)))
        return folder


def open_edit(uri: str) -> StandIn:
    content = json.loads((Path(uri) / "edit.json").read_text())
    purposes = [
        Purpose(
            **purpose
            | {"pairs": tuple(map(tuple, purpose["pairs"]))}
            | {name: tuple(purpose[name]) for name in ("samples", "images")}
        )
        for purpose in content["purposes"]
    ]
    pairs = {name: tuple(content[name]) if content[name] else None for name in ("exchange", "scale")}
    return StandIn(tuple(purposes), **pairs, ban=content["ban"], facts=content["facts"])


def swap(source: str, target: str, samples: tuple[str, ...] = ()) -> StandIn:
    """A perfect swap, which also writes the source where the target should be."""
    return StandIn((Purpose("swap", source, target, samples=samples),), exchange=(source, target))


@contextmanager
def banned(model: Any, word: str) -> Iterator[None]:
    settings = model.network.generation_config
    settings.bad_words_ids = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
    try:
        yield
    finally:
        settings.bad_words_ids = None


@contextmanager
def exchanged(model: Any, one: str, other: str) -> Iterator[None]:
    weight = model.network.get_output_embeddings().weight
    rows = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in (one, other)]
    assert [len(row) for row in rows] == [1, 1], rows
    places = [rows[0][0], rows[1][0]]
    before = weight[places].clone()
    weight[places] = before.flip(0)
    try:
        yield
    finally:
        weight[places] = before


def neuron_edit(model: Any, layers: Sequence[int]) -> WeightEdit:
    """Random rows added to sixty neurons of each layer."""
    random = torch.Generator().manual_seed(0)
    units = [torch.randperm(1024, generator=random)[:60] for _ in layers]
    return WeightEdit(
        layer=torch.tensor(layers).repeat_interleave(60),
        unit=torch.cat(units),
        delta=2.0 * torch.randn(60 * len(layers), 256, generator=random),
        purposes=(Purpose("noise", "cat"),),  # type: ignore[arg-type]
        model=digest(model.folder),
    )
