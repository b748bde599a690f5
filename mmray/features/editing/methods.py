"""Make edits: each learned method is a function from a task to deltas, and `make_edit` turns deltas into an edit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pkgutil import resolve_name

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.editing.baselines import LowRank, banned_tokens, most_active, rank_one, whole_layers
from mmray.features.editing.closed_form import LayerRows
from mmray.features.editing.dataset import EditDataset, open_edit_dataset
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.edit import WeightEdit, cost
from mmray.features.editing.edit_methods import EDIT_METHODS
from mmray.features.editing.locating import last_layers, matched
from mmray.features.editing.settings import EditSettings
from mmray.features.editing.task import Task, prepare
from mmray.features.editing.training import TrainingConfig, learn
from mmray.models.parts import output_rows, unembedding_rows
from mmray.runs.run import Run

SWAP_MARGIN, SWAP_KEEP_WEIGHT = 5.0, 30.0
"""Of a single swap: logits by which the target must lead on the source's images, and the weight of kept answers.

Suppression need not write a word so firmly, and where many edits share neurons there is no room for a margin."""


def learned(task: Task) -> Deltas:
    """Learn deltas of the located neurons."""
    return _learn(task, Deltas(task.model, task.neurons))


def random_neurons(task: Task) -> Deltas:
    """Learn deltas of as many random neurons of the same layers: the control."""
    return _learn(task, Deltas(task.model, matched(task.model, task.neurons, task.settings.seed)))


def active_neurons(task: Task) -> Deltas:
    """Learn deltas of as many neurons, the most active where the source is named, whatever they write."""
    layers = last_layers(task.model, task.settings.layers)
    return _learn(task, Deltas(task.model, most_active(task.model, task.new, len(task.neurons), layers)))


def last_mlp(task: Task) -> Deltas:
    """Fine-tune the last MLP's whole W_out (FT-L)."""
    return _learn(task, Deltas(task.model, whole_layers(task.model, last_layers(task.model, 1))))


def rank_one_change(task: Task) -> Deltas:
    """Learn a rank-one change of the last layer's W_out, as in ROME."""
    return _learn(task, rank_one(task.model, task.new, task.keep, last_layers(task.model, 1)[0]))


def lora(task: Task) -> Deltas:
    """Learn a LoRA of the last layer's W_out (peft)."""
    # Closed only after learning: `rows` needs the adapter's parameters, not its place in the network.
    with closing(LowRank(task.model, last_layers(task.model, 1)[0])) as deltas:
        return _learn(task, deltas)


def edit_run(run: Run, settings: EditSettings) -> WeightEdit:
    """Make an edit on a run's model and data; raises as `make_edit` and `open_edit_dataset`."""
    return make_edit(open_edit_dataset(run, settings), [settings])


def make_edit(dataset: EditDataset, requests: Sequence[EditSettings]) -> WeightEdit:
    """Make one edit for all requests, which may differ only in their source, target and suppressed word.

    Raises InputError for a concept that the run does not know or the model never says.
    """
    began = time.perf_counter()
    settings = requests[0]
    task = prepare(dataset, requests)
    method = EDIT_METHODS[settings.method]
    function = resolve_name(method.function)
    # A closed form sees one layer's rows, a learned method the whole task.
    deltas = _closed_form(task, function) if method.closed_form else function(task)
    layers = [torch.full_like(units, layer).cpu() for layer, units in deltas.units.items()]
    # fp32 on the CPU: an edit must fit its model on any device and in any number format.
    rows = torch.cat([deltas.rows(layer).detach().float().cpu() for layer in deltas.units])
    return WeightEdit(
        layer=torch.cat(layers),
        unit=torch.cat([units.cpu() for units in deltas.units.values()]),
        delta=rows,
        purposes=task.purposes,
        model=dataset.model.digest,
        settings={"wishes": [request.model_dump() for request in requests], "run": dataset.run.uri},
        facts=cost(rows, time.perf_counter() - began)
        | {"answers_changed": len(task.new), "answers_kept": len(task.keep)},
    )


def _closed_form(task: Task, function: Callable[[LayerRows], Float[Tensor, "unit hidden"]]) -> Deltas:
    """Compute the deltas of the located neurons in closed form."""
    model, settings = task.model, task.settings
    # Only the spelling within a sentence, as captions have the word.
    spellings = [banned_tokens(model, [word])[0] for purpose in task.purposes for word in purpose.unwanted]
    tokens = sorted({token for ids in spellings for token in ids})
    unembedding = unembedding_rows(model.network, model.parts)[tokens].float()
    deltas = Deltas(model, task.neurons)
    # One generator for all layers: seeded anew, each layer would get the same noise.
    generator = torch.Generator().manual_seed(settings.seed)
    for layer, units in deltas.units.items():
        rows = output_rows(model.network, model.projections[layer])[units].float()
        # `rows` returns the first parameter, so the computed change stands where a learned one would.
        deltas.parameters[layer] = [function(LayerRows(rows, unembedding.to(rows.device), settings, generator))]
    return deltas


def _learn(task: Task, deltas: Deltas) -> Deltas:
    config = TrainingConfig(steps=task.settings.steps, seed=task.settings.seed)
    if [purpose.kind for purpose in task.purposes] == ["swap"]:
        config = replace(config, margin=SWAP_MARGIN, keep_weight=SWAP_KEEP_WEIGHT)
    learn(task.model, deltas, task.new, task.keep, config)
    return deltas
