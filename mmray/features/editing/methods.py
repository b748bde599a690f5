"""Make edits: each learned method is a function from a task to deltas, and `make_edit` turns deltas into an edit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pkgutil import resolve_name
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.errors import InputError
from mmray.features.editing.baselines import LowRank, most_active, rank_one, whole_layers
from mmray.features.editing.bounds import TEXT_ONLY
from mmray.features.editing.closed_form import LayerRows
from mmray.features.editing.dataset import EditDataset, open_edit_dataset
from mmray.features.editing.deltas import Deltas, Neuron
from mmray.features.editing.edit import WeightEdit, cost
from mmray.features.editing.edit_methods import EDIT_METHODS
from mmray.features.editing.locating import last_layers, matched
from mmray.features.editing.patch import Detectors, Patch
from mmray.features.editing.resumed_forward import can_be_resumed
from mmray.features.editing.settings import EditSettings
from mmray.features.editing.task import FIRST_OPENING, OPENINGS, Task, prepare
from mmray.features.editing.training import TrainingConfig, learn
from mmray.features.editing.validation import broken, excess, validate
from mmray.features.editing.whitening import null_space
from mmray.models.bans import banned_tokens
from mmray.models.norms import lens
from mmray.models.packed_linear import packed_linears
from mmray.models.parts import output_rows
from mmray.runs.run import Run

SWAP_MARGIN = 5.0
"""Logits by which the target of a swap must lead on its images. Suppression need not write a word so firmly."""
PATCH_KEEP_WEIGHT = 10.0
"""Weight of kept captions and answers in a patch, which does little to them: with the usual one, it hardly carries over
to other images."""
HALLUCINATION_CURVATURE_WEIGHT = 10.0
"""What a model makes up is harder to tell from what it sees than one word from others."""
ABOUT_IMAGES = ("captions", "answers")
"""Kept answers that a whitened edit also learns one by one, because they are most like what it changes."""


def learned(task: Task) -> Deltas:
    """Learn deltas of the located neurons, whitened by what kept answers use."""
    return _learn(task, _whitened(task, task.neurons))


def null_space_of_kept(task: Task) -> Deltas:
    """Learn deltas of the located neurons in directions that kept answers hardly use (AlphaEdit)."""
    deltas = Deltas(task.model, task.neurons)
    for layer in deltas.units:
        left = null_space(task.curvature.second_moment(deltas, layer))
        deltas.shapes[layer] = left, torch.eye(deltas.parameters[layer][0].shape[1], device=left.device)
    return _learn(task, deltas)


def plain(task: Task) -> Deltas:
    """Learn deltas of the located neurons, with every direction alike."""
    return _learn(task, Deltas(task.model, task.neurons))


def random_neurons(task: Task) -> Deltas:
    """Learn deltas of as many random neurons of the same layers: the control."""
    return _learn(task, _whitened(task, matched(task.model, task.neurons, task.settings.seed)))


def active_neurons(task: Task) -> Deltas:
    """Learn deltas of as many neurons, the most active where the source is named, whatever they write."""
    layers = last_layers(task.model, task.settings.layers)
    return _learn(task, _whitened(task, most_active(task.model, task.new, len(task.neurons), layers)))


def last_mlp(task: Task) -> Deltas:
    """Fine-tune the last MLP's whole W_out (FT-L)."""
    return _learn(task, Deltas(task.model, whole_layers(task.model, last_layers(task.model, 1))))


def rank_one_change(task: Task) -> Deltas:
    """Learn a rank-one change of the last layer's W_out, as in ROME."""
    return _learn(task, rank_one(task.model, task.new, task.kept.every, last_layers(task.model, 1)[0]))


def patch(task: Task) -> Deltas:
    """Let idle neurons of the last layer detect the word and write another one."""
    task.before.detectors = task.before.detectors or Detectors.of(task)
    return _learn(task, Patch(task, task.before.detectors, OPENINGS[task.opening].share))


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

    `facts` record each try, and why the edit is this one: the first whose measures on the validation split are all
    within BOUNDS, or else, of those that take, the one that exceeds them least. Raises InputError for a concept that
    the run does not know or the model never says.
    """
    began = time.perf_counter()
    settings = {"wishes": [request.model_dump() for request in requests], "run": dataset.run.uri}
    return make_task_edit(prepare(dataset, requests), settings, began)


def make_task_edit(task: Task, settings: dict[str, Any], began: float) -> WeightEdit:
    """Make the edit of a task as `make_edit` does; `settings` and the time when it `began` are what it remembers."""
    with packed_linears(task.model.network):
        tries = [_tried(first_try(task))]
        while (following := next_try(task, tries)) is not None:
            tries.append(_tried(following))
    # An edit that does not take is none, whatever it leaves alone.
    chosen = min(tries, key=lambda one: (not one.takes, excess(one.measures)))
    deltas = chosen.deltas
    layers = [torch.full_like(units, layer).cpu() for layer, units in deltas.units.items()]
    # fp32 on the CPU: an edit must fit its model on any device and in any number format.
    rows = torch.cat([deltas.rows(layer).detach().float().cpu() for layer in deltas.units])
    inputs = None if deltas.inputs is None else deltas.inputs.float().cpu()
    return WeightEdit(
        layer=torch.cat(layers),
        unit=torch.cat([units.cpu() for units in deltas.units.values()]),
        delta=rows,
        purposes=task.purposes,
        model=task.model.digest,
        settings=settings,
        facts=cost(rows, time.perf_counter() - began, inputs)
        | {"answers_changed": len(task.new), "answers_kept": len(task.kept.every)}
        | {"validation": chosen.measures, "broken": chosen.broken, "tries": [one.record for one in tries]},
        inputs=inputs,
    )


@dataclass(frozen=True)
class Try:
    """A try at an edit, and how it does on its validation split."""

    task: Task
    deltas: Deltas
    measures: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """The measures that are beyond their bound."""
        return broken(self.measures)

    @property
    def takes(self) -> bool:
        """Whether it does what it is for, on its own images and on others."""
        return not {"reliability", "image_generality"} & set(self.broken)

    @property
    def neurons(self) -> int:
        """How many it changes."""
        return sum(map(len, self.deltas.units.values()))

    @property
    def record(self) -> dict[str, Any]:
        """What an edit remembers of it."""
        opening = asdict(OPENINGS[self.task.opening]) if self.task.settings.method == "patch" else {}
        return {
            "method": self.task.settings.method,
            "neurons": self.neurons,
            **opening,
            **self.measures,
            "broken": self.broken,
        }


def first_try(task: Task) -> Task:
    """Return the first try: few of the located neurons; several words at once are patched from the start."""
    if not task.settings.searches or task.settings.method == "patch":
        return task
    if len(task.purposes) == 1:
        return replace(task, neurons=task.neurons[: task.settings.neuron_limit])
    return patched(task) or task


def next_try(task: Task, tries: Sequence[Try]) -> Task | None:
    """Return the try after these; None if the last one breaks no bound, or nothing is left to try.

    More located neurons write a word with less change to other captions: they come next, unless text-only replies have
    changed already, of which they change more. Then come patches. They open later if the last one takes and changes
    what should stay; earlier, and then with a larger margin, if it does not take. Where neurons can't be rewritten,
    there are none.
    """
    last = tries[-1]
    if not task.settings.searches or not last.broken:
        return None
    if last.task.settings.method != "patch":
        more = task if len(task.neurons) > last.neurons else None
        if TEXT_ONLY & set(last.broken):
            return patched(task) or more
        return more or patched(task)
    following = last.task.opening + (-1 if last.takes else 1)
    tried = {one.task.opening for one in tries if one.task.settings.method == "patch"}
    # Back at an opening that was tried: an edit that takes changes too much, and one that changes less doesn't take.
    if following in tried or not 0 <= following < len(OPENINGS):
        return None
    return replace(last.task, opening=following)


def patched(task: Task) -> Task | None:
    """Return the task of a patch; None where the model's neurons can't be rewritten."""
    try:
        task.before.detectors = task.before.detectors or Detectors.of(task)
    except InputError:
        return None
    return replace(task, settings=task.settings.model_copy(update={"method": "patch"}), opening=FIRST_OPENING)


def _tried(task: Task) -> Try:
    method = EDIT_METHODS[task.settings.method]
    function = resolve_name(method.function)
    # A closed form sees one layer's rows, a learned method the whole task.
    deltas = _closed_form(task, function) if method.closed_form else function(task)
    if not can_be_resumed(task.model):
        # A closed form can be made without a look at answers, and is saved unmeasured.
        return Try(task, deltas, {})
    gone = all(purpose.kind in ("suppress", "noise") for purpose in task.purposes)
    measures = validate(task.model, deltas, task.new, task.held_out, task.kept.held_out, gone=gone, before=task.before)
    return Try(task, deltas, measures)


def _closed_form(task: Task, function: Callable[[LayerRows], Float[Tensor, "unit hidden"]]) -> Deltas:
    """Compute the deltas of the located neurons in closed form."""
    model, settings = task.model, task.settings
    # Only the spelling within a sentence, as captions have the word.
    spellings = [banned_tokens(model, [word])[0] for purpose in task.purposes for word in purpose.unwanted]
    tokens = sorted({token for ids in spellings for token in ids})
    unembedding = lens(model)[tokens].float()
    deltas = Deltas(model, task.neurons)
    # One generator for all layers: seeded anew, each layer would get the same noise.
    generator = torch.Generator().manual_seed(settings.seed)
    for layer, units in deltas.units.items():
        rows = output_rows(model.network, model.projections[layer])[units].float()
        # `rows` returns the first parameter, so the computed change stands where a learned one would.
        deltas.parameters[layer] = [function(LayerRows(rows, unembedding.to(rows.device), settings, generator))]
    return deltas


def _whitened(task: Task, neurons: Sequence[Neuron]) -> Deltas:
    """Return deltas of these neurons, whitened by what kept answers use."""
    deltas = Deltas(task.model, neurons)
    deltas.whitened = True
    for layer in deltas.units:
        deltas.shapes[layer] = task.curvature.shape(deltas, layer)
    return deltas


def _learn(task: Task, deltas: Deltas) -> Deltas:
    config = TrainingConfig(steps=task.settings.steps, weights=task.settings.weights, seed=task.settings.seed)
    if {purpose.kind for purpose in task.purposes} == {"swap"}:
        config = replace(config, margin=SWAP_MARGIN)
    if isinstance(deltas, Patch):
        margin = 0.0 if task.settings.reduce_hallucination else OPENINGS[task.opening].margin
        config = replace(config, margin=margin, keep_weight=PATCH_KEEP_WEIGHT)
    if task.settings.reduce_hallucination:
        config = replace(config, curvature_weight=HALLUCINATION_CURVATURE_WEIGHT)
    kinds = ABOUT_IMAGES if deltas.whitened else task.kept.learned
    learn(task.model, deltas, task.new, {kind: task.kept.learned[kind] for kind in kinds}, config, task.before)
    return deltas
