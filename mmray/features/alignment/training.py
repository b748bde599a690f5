"""The training of an aligned network, as each worker of Ray Train runs it, and its checkpoints in the run's folder.

    checkpoints/00000200.safetensors    weights, the optimiser's moments and the progress, committed once

A checkpoint is complete before it has its name. Training always starts at the last one, at first or after a crash.
Rank 0 decides which that is, because a dying worker may commit another while the others list them.
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
from PIL.Image import new as new_image
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
from mmray.detector.vision_tower import open_tower
from mmray.errors import InputError
from mmray.features.alignment.settings import AlignmentSettings
from mmray.runs import RunFolder
from mmray.storage import Store, with_retries

PREFIX, SUFFIX = "checkpoints/", ".safetensors"
KEPT = 2
"""Last checkpoints that are kept."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in the optimiser's state."""
PROBLEM = "problem.txt"
"""Key of a worker's message about a wrong set-up."""

logger = logging.getLogger(__name__)


@dataclass
class TrainingProgress:
    """Progress of a training: steps over all epochs, images trained on, unreadable images, and the last loss."""

    step: int = 0
    seen: int = 0
    lost: int = 0
    loss: float = float("nan")


def open_pair(settings: AlignmentSettings, device: torch.device | None = None) -> Pair:
    """Load tower and LLaVA, frozen, on one device; by default that of `mmray.models.loading.load`."""
    from mmray.models.loading import load as load_model

    model = load_model(settings.model, device=device)
    return Pair(open_tower(settings.tower, device or model.device), model)


def train(config: dict[str, Any]) -> None:
    """Train, or resume a training: the function that Ray Train runs in every worker.

    A restart can't fix a wrong set-up. So the worker writes the problem down for the driver, and all workers end.
    """
    settings: AlignmentSettings = config["settings"]
    # Relative paths in the settings are relative to the driver's directory.
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
    # After the pair is loaded, and on every worker alike, so that all networks start equal.
    torch.manual_seed(settings.seed)
    network = pair.network(settings.network, settings.hidden).to(pair.model.device)
    adamw = optimiser(network, settings.learning_rate, settings.weight_decay)
    done = _resume(folder.store, network, adamw)
    context = ray.train.get_context()
    # Each worker takes every n-th row of a batch, so the union of all is the batch for any number of workers.
    own = range(context.get_world_rank(), order.batch_size, context.get_world_size())
    wrapped: nn.Module = prepare_model(network, move_to_device=False)
    source = with_retries(lambda: open_source(settings.data, Columns(), captions=False))
    first_step = 0
    for epoch in range(settings.epochs):
        steps = order.steps(epoch)
        if done.step < first_step + steps:
            for rows in order.read(source, epoch, own, max(0, done.step - first_step)):
                _step(pair, wrapped, adamw, rows, done)
                if done.step % settings.checkpoint_every == 0:
                    _checkpoint(folder.store, network, adamw, done)
        first_step += steps
    if context.get_world_rank() == 0:
        save_alignment(folder.store, network, {**facts, "training": vars(done)})
    _checkpoint(folder.store, network, adamw, done)


def _step(
    pair: Pair,
    network: nn.Module,
    adamw: torch.optim.Optimizer,
    rows: Sequence[Sample | Failure],
    done: TrainingProgress,
) -> None:
    """Take one training step on these rows. The gradient is that of the mean over all workers' images."""
    images = []
    for row in rows:
        try:
            if isinstance(row, Sample) and row.image is not None:
                images.append(decode_image(row.image, row.background))
        except ValueError as error:
            logger.warning("%s: image can't be read: %s", row.source, error)
    counts = torch.tensor([len(images), len(rows) - len(images), 0.0], dtype=torch.float64)
    _sum_over_workers(counts[:2])
    # A worker without an image of its own runs a blank one, because the others wait for its gradients.
    embedding, tokens = pair.examples(images or [new_image("RGB", (64, 64))])
    embedding, tokens = embedding[: len(images)], tokens[: len(images)]
    loss = alignment_loss(network, embedding, tokens, int(counts[0]))
    adamw.zero_grad()
    # The workers' losses add up to the mean over all images. DDP averages gradients; the factor makes that a sum.
    (loss * ray.train.get_context().get_world_size()).backward()
    adamw.step()
    counts[2] = loss.detach()
    _sum_over_workers(counts[2:])
    done.step, done.seen, done.lost = done.step + 1, done.seen + int(counts[0]), done.lost + int(counts[1])
    done.loss = float(counts[2])


def _sum_over_workers(values: Tensor) -> None:
    """Add up values over all workers, in place."""
    if _is_distributed():
        # NCCL reduces tensors on GPUs only.
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        moved = values.to(device)
        torch.distributed.all_reduce(moved)
        values.copy_(moved)


def _is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _checkpoint(store: Store, network: Alignment, adamw: torch.optim.Optimizer, done: TrainingProgress) -> None:
    """Commit a checkpoint from rank 0, while the other workers wait in `report`."""
    if ray.train.get_context().get_world_rank() == 0:
        store.commit(f"{PREFIX}{done.step:08d}{SUFFIX}", _bytes(network, adamw, done))
        for key in checkpoints(store)[:-KEPT]:
            store.delete(key)
    ray.train.report(vars(done))


def _bytes(network: Alignment, adamw: torch.optim.Optimizer, done: TrainingProgress) -> bytes:
    tensors = {f"weights.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for moment in MOMENTS:
            # Before its first step the optimiser has no moments.
            if moment in adamw.state[parameter]:
                tensors[f"{moment}.{name}"] = adamw.state[parameter][moment]
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    tensors["progress"] = torch.tensor([done.step, done.seen, done.lost, done.loss], dtype=torch.float64)
    return bytes(save(tensors))


def checkpoints(store: Store) -> list[str]:
    """Return the keys of the checkpoints, the newest last."""
    return [entry.key for entry in store.list(PREFIX)]


def steps_of(checkpoint: str) -> int:
    """Return the number of steps before a checkpoint, given its key."""
    return int(checkpoint.removeprefix(PREFIX).removesuffix(SUFFIX))


def restore(store: Store, key: str, network: Alignment, adamw: torch.optim.Optimizer | None = None) -> TrainingProgress:
    """Read a checkpoint into a network, and into its optimiser if there is one."""
    tensors = load(store.read(key))
    step, seen, lost, loss = tensors.pop("progress").tolist()
    network.load_state_dict({name: tensors[f"weights.{name}"] for name in network.state_dict()})
    if adamw is not None and step:
        for name, parameter in network.named_parameters():
            moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            adamw.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return TrainingProgress(int(step), int(seen), int(lost), loss)


def _resume(store: Store, network: Alignment, adamw: torch.optim.Optimizer) -> TrainingProgress:
    """Restore the last checkpoint, if there is one; rank 0 decides which it is."""
    last: list[str | None] = [next(reversed(checkpoints(store)), None)]
    if _is_distributed():
        torch.distributed.broadcast_object_list(last, src=0)
    return restore(store, last[0], network, adamw) if last[0] else TrainingProgress()
