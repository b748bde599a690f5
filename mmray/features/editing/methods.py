"""Every way to make an edit, one signature: the task in, what is to be added to which rows out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from mmray.features.editing.baselines import LowRank, banned_tokens, most_active, rank_one, whole_layers
from mmray.features.editing.closed_form import CLOSED, Row
from mmray.features.editing.dataset import EditDataset, open_edit_dataset
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.edit import WeightEdit, cost
from mmray.features.editing.locating import last_layers, matched
from mmray.features.editing.settings import EditSettings
from mmray.features.editing.task import Task, prepare
from mmray.features.editing.training import TrainingConfig, learn
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows, unembedding_rows
from mmray.runs.run import Run

Method = Callable[[Task], Deltas]

SWAP_MARGIN, SWAP_KEEP = 5.0, 30.0
"""Of a single swap, logits by which the target is to lead on the source's images, and what the answers that are to stay
weigh against that. What suppresses a word need not say another so firmly, and where many edits share the neurons there
is no room for it."""


def learned(task: Task) -> Deltas:
    """Learn deltas of the located neurons."""
    return _learn(task, Deltas(task.material.model, task.neurons))


def on_random(task: Task) -> Deltas:
    """Learn deltas of as many random neurons of the same layers: the control."""
    return _learn(task, Deltas(task.material.model, matched(task.material.model, task.neurons, task.settings.seed)))


def on_active(task: Task) -> Deltas:
    """Learn deltas of as many neurons, the most active where the source is named: blind to what they write."""
    model = task.material.model
    neurons = most_active(model, task.new, len(task.neurons), last_layers(model, task.settings.layers))
    return _learn(task, Deltas(model, neurons))


def last_mlp(task: Task) -> Deltas:
    """Fine-tune the last MLP's whole W_out (FT-L)."""
    return _learn(task, Deltas(task.material.model, whole_layers(task.material.model, last_layers(_model(task), 1))))


def by_rank_one(task: Task) -> Deltas:
    """Learn a rank-one change of the last layer's W_out (as ROME)."""
    return _learn(task, rank_one(_model(task), task.new, task.keep, last_layers(_model(task), 1)[0]))


def lora(task: Task) -> Deltas:
    """Learn a LoRA of the last layer's W_out (peft)."""
    with closing(LowRank(_model(task), last_layers(_model(task), 1)[0])) as deltas:
        return _learn(task, deltas)


def closed_form(task: Task) -> Deltas:
    """Compute the deltas of the located neurons in closed form."""
    model, settings = task.material.model, task.settings
    spellings = [banned_tokens(model, [word])[0] for purpose in task.purposes for word in purpose.unwanted]
    tokens = sorted({token for ids in spellings for token in ids})
    unembedding = unembedding_rows(model.network, model.parts)[tokens].float()
    deltas = Deltas(model, task.neurons)
    generator = torch.Generator().manual_seed(settings.seed)
    for layer, units in deltas.units.items():
        rows = output_rows(model.network, model.projections[layer])[units].float()
        added = CLOSED[settings.method](Row(rows, unembedding.to(rows.device), settings, generator))
        deltas.learnt[layer] = [added]
    return deltas


METHODS: dict[str, Method] = {
    "learned": learned,
    "random": on_random,
    "activation": on_active,
    "last-mlp": last_mlp,
    "rank-one": by_rank_one,
    "lora": lora,
    **dict.fromkeys(CLOSED, closed_form),
}
"""The methods that change weights, by the name that `--method` takes."""


def edit_run(run: Run, settings: EditSettings) -> WeightEdit:
    """Make an edit on a run's model and data; raises as `make_edit` and `open_edit_dataset`."""
    return make_edit(open_edit_dataset(run, settings), [settings])


def make_edit(material: EditDataset, wishes: Sequence[EditSettings]) -> WeightEdit:
    """Make one edit for all the wishes, which agree in all but what they are for.

    Raises InputError for a concept that the run does not know or the model never says.
    """
    began = time.perf_counter()
    model, settings = material.model, wishes[0]
    task = prepare(material, wishes)
    deltas = METHODS[settings.method](task)
    layers = [torch.full_like(units, layer).cpu() for layer, units in deltas.units.items()]
    rows = torch.cat([deltas.rows(layer).detach().float().cpu() for layer in deltas.units])
    return WeightEdit(
        layer=torch.cat(layers),
        unit=torch.cat([units.cpu() for units in deltas.units.values()]),
        delta=rows,
        purposes=task.purposes,
        model=model.digest,
        settings={"wishes": [wish.model_dump() for wish in wishes], "run": material.run.uri},
        facts=cost(rows, time.perf_counter() - began)
        | {"answers_changed": len(task.new), "answers_kept": len(task.keep)},
    )


def _learn(task: Task, deltas: Deltas) -> Deltas:
    config = TrainingConfig(steps=task.settings.steps, seed=task.settings.seed)
    if [purpose.kind for purpose in task.purposes] == ["swap"]:
        config = replace(config, margin=SWAP_MARGIN, keep=SWAP_KEEP)
    learn(task.material.model, deltas, task.new, task.keep, config)
    return deltas


def _model(task: Task) -> LoadedModel:
    return task.material.model
