"""The training of an aligned network as each of its workers runs it, and its checkpoints in the run's folder.

    checkpoints/00000200.safetensors    weights, the optimiser's moments and how far it is, committed once

A checkpoint is whole before it has its name. Whoever begins, the first time or after a death, begins at the last one:
the first worker says which that is, for a dying one may have committed another while it was looked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed
from ray.train.torch import get_device, prepare_model
from safetensors.torch import load, save
from torch import Tensor, nn

from mmray.data.columns import Columns
from mmray.data.images import decode_image
from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest
from mmray.data.sources import open_source
from mmray.data.training_order import TrainingOrder
from mmray.detector.alignment import Alignment, Pair, alignment_loss, optimiser, save_alignment
from mmray.detector.alignment_settings import AlignmentSettings
from mmray.detector.vision_tower import open_tower
from mmray.errors import InputError
from mmray.runs import RunFolder
from mmray.storage import Store, with_retries

PREFIX, SUFFIX = "checkpoints/", ".safetensors"
KEPT = 2
"""Checkpoints that are kept, the last ones."""
MOMENTS = ("exp_avg", "exp_avg_sq")
PROBLEM = "problem.txt"
"""Key of what a worker found wrong with the set-up."""

logger = logging.getLogger(__name__)


@dataclass
class TrainingProgress:
    """How far a training is: steps of all epochs, images learnt from, images that could not be read, the last loss."""

    step: int = 0
    seen: int = 0
    lost: int = 0
    loss: float = float("nan")


def open_pair(settings: AlignmentSettings, device: torch.device | None = None) -> Pair:
    """Load tower and LLaVA, frozen, on one device; by default wherever a model is put (`mmray.models.loading.load`)."""
    from mmray.models.loading import load as load_model

    model = load_model(settings.model, device=device)
    return Pair(open_tower(settings.tower, device or model.device), model)


def train(config: dict[str, Any]) -> None:
    """Train to the end, or go on: the function that Ray Train runs in every worker.

    What is wrong with the set-up no restart fixes: it is written down, and the workers end.
    """
    settings: AlignmentSettings = config["settings"]
    if Path(config["home"]).is_dir():
        os.chdir(config["home"])
    torch.set_num_threads(config["threads"])
    folder = with_retries(lambda: RunFolder.at(settings.out))
    if folder.store.exists(PROBLEM):
        return
    try:
        _train(settings, folder, config["facts"])
    except InputError as error:
        folder.store.put(PROBLEM, str(error).encode())


def _train(settings: AlignmentSettings, folder: RunFolder, facts: dict[str, Any]) -> None:
    order = TrainingOrder(Manifest.from_json(folder.manifest()), settings.batch_size, settings.seed)
    # Ray Train shows a worker the GPUs of all workers of its machine.
    pair = open_pair(settings, get_device())
    torch.manual_seed(settings.seed)
    network = pair.network(settings.network, settings.hidden).to(pair.model.device)
    learner = optimiser(network, settings.learning_rate, settings.weight_decay)
    done = _resume(folder.store, network, learner)
    context = ray.train.get_context()
    own = range(context.get_world_rank(), order.batch_size, context.get_world_size())
    wrapped: nn.Module = prepare_model(network, move_to_device=False)
    source = with_retries(lambda: open_source(settings.data, Columns(), captions=False))
    before = 0
    for epoch in range(settings.epochs):
        steps = order.steps(epoch)
        for rows in order.read(source, epoch, own, max(0, done.step - before)) if done.step < before + steps else ():
            _step(pair, wrapped, learner, rows, done)
            if done.step % settings.checkpoint_every == 0:
                _checkpoint(folder.store, network, learner, done)
        before += steps
    if context.get_world_rank() == 0:
        save_alignment(folder.store, network, {**facts, "training": vars(done)})
    _checkpoint(folder.store, network, learner, done)


def _step(
    pair: Pair,
    network: nn.Module,
    learner: torch.optim.Optimizer,
    rows: Sequence[Sample | Failure],
    done: TrainingProgress,
) -> None:
    """Learn from one step's rows: the gradient is that of the mean over all workers' images."""
    images = []
    for row in rows:
        try:
            if isinstance(row, Sample) and row.image is not None:
                images.append(decode_image(row.image, row.background))
        except ValueError as error:
            logger.warning("%s: image can't be read: %s", row.source, error)
    counts = torch.tensor([len(images), len(rows) - len(images), 0.0], dtype=torch.float64)
    _sum(counts[:2])
    # Without an image of its own a worker takes part all the same: the others wait for its gradients.
    embedding, tokens = pair.examples(images or [_blank()])
    embedding, tokens = embedding[: len(images)], tokens[: len(images)]
    part = alignment_loss(network, embedding, tokens, int(counts[0]))
    learner.zero_grad()
    # Gradients are averaged over the workers, and the parts add up.
    (part * ray.train.get_context().get_world_size()).backward()
    learner.step()
    counts[2] = part.detach()
    _sum(counts[2:])
    done.step, done.seen, done.lost = done.step + 1, done.seen + int(counts[0]), done.lost + int(counts[1])
    done.loss = float(counts[2])


def _blank() -> Any:
    from PIL.Image import new

    return new("RGB", (64, 64))


def _sum(values: Tensor) -> None:
    """Add up over all workers, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        moved = values.to(device)
        torch.distributed.all_reduce(moved)
        values.copy_(moved)


def _checkpoint(store: Store, network: Alignment, learner: torch.optim.Optimizer, done: TrainingProgress) -> None:
    """Commit how far the training is; the first worker does, and all wait for it."""
    if ray.train.get_context().get_world_rank() == 0:
        store.commit(f"{PREFIX}{done.step:08d}{SUFFIX}", _bytes(network, learner, done))
        for key in checkpoints(store)[:-KEPT]:
            store.delete(key)
    ray.train.report(vars(done))


def _bytes(network: Alignment, learner: torch.optim.Optimizer, done: TrainingProgress) -> bytes:
    tensors = {f"weights.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for moment in MOMENTS:
            if moment in learner.state[parameter]:
                tensors[f"{moment}.{name}"] = learner.state[parameter][moment]
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    kept["progress"] = torch.tensor([done.step, done.seen, done.lost, done.loss], dtype=torch.float64)
    return bytes(save(kept))


def checkpoints(store: Store) -> list[str]:
    """Return the keys of the checkpoints, the last one last."""
    return [entry.key for entry in store.list(PREFIX)]


def steps_of(checkpoint: str) -> int:
    """Return after how many steps a checkpoint was written, by its key."""
    return int(checkpoint.removeprefix(PREFIX).removesuffix(SUFFIX))


def restore(
    store: Store, key: str, network: Alignment, learner: torch.optim.Optimizer | None = None
) -> TrainingProgress:
    """Read a checkpoint into a network, and where one is given into its optimiser."""
    tensors = load(store.read(key))
    step, seen, lost, loss = tensors.pop("progress").tolist()
    network.load_state_dict({name: tensors[f"weights.{name}"] for name in network.state_dict()})
    for name, parameter in network.named_parameters() if learner is not None and step else ():
        assert learner is not None
        moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
        learner.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return TrainingProgress(int(step), int(seen), int(lost), loss)


def _resume(store: Store, network: Alignment, learner: torch.optim.Optimizer) -> TrainingProgress:
    """Begin where the last checkpoint is; the first worker says which."""
    last: list[str | None] = [next(reversed(checkpoints(store)), None)]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(last, src=0)
    return restore(store, last[0], network, learner) if last[0] else TrainingProgress()
