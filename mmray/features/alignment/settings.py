"""Settings of `mmray align`, each with its documentation."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmray.detector import Shape
from mmray.engine.settings import JobSettings, Workers, after_work, checked, execution, known_by_digest


class AlignmentSettings(JobSettings):
    """All settings of `mmray align`; defaults of the training are as published.

    Validation settings may change without training again, because they are applied after the training.
    """

    tower: str = known_by_digest()
    """Checkpoint with the detector's tower: an OWL-ViT or OWLv2, or a LLaVA's own; a folder, hub id, or `demo`."""
    model: str = known_by_digest()
    """LLaVA whose image tokens the network makes: checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """Images to train on, text is not read: `demo`, Parquet, WebDataset tars, image folder, COCO, or
    `hf:NAME[:SPLIT]`; local or s3://."""
    out: str = execution()
    """Folder of the aligned network and its checkpoints: a local path or s3://bucket/prefix."""
    validate_on: str = after_work()
    """Data with objects, on which the joint model is compared with the original before it is used."""
    limit: int | None = Field(None, ge=1)
    """Use the first N images only; all by default."""
    network: Shape = "mlp"
    """mlp: four layers with ReLU, the authors' final choice; projector: the shape of LLaVA's own."""
    hidden: int = Field(8192, ge=1)
    """Width of the inner layers of mlp."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(1e-2, ge=0)
    """Of AdamW."""
    batch_size: int = Field(16, ge=1)
    """Images per step, over all workers."""
    epochs: int = Field(1, ge=1)
    """Passes over the images."""
    shard_size: int = Field(500, ge=1)
    """Images per shard; a shard is read in order."""
    seed: int = 0
    """Seed of the initial weights, the order of images, and the validation."""
    checkpoint_every: int = execution(200, ge=1)
    """Steps between checkpoints: the most that a crash costs."""
    validate_limit: int = after_work(500, ge=1)
    """Samples in the validation."""
    pope_objects: int = after_work(1, ge=1)
    """Present objects per image that POPE asks about, and as many absent ones per setting (published: 3)."""
    draws: int = after_work(1000, ge=1)
    """Bootstrap draws over images, for intervals."""
    workers: Workers = execution(None)
    """Workers: a number, or MIN:MAX, where the training takes MIN and the validation scales with the cluster. Default:
    one per GPU of the cluster; without GPUs one per core, at most four per machine."""
    gpus_per_worker: float | None = execution(None, ge=0)
    """GPUs per worker; the training uses the first. Default: 1 where the cluster has GPUs, else 0."""
    local: bool = execution(False)
    """Validate in this process, without Ray; the training, which needs Ray, must have ended."""
    restarts: int = execution(20, ge=0)
    """Times that the training restarts at its last checkpoint when workers die; the same command resumes it too."""


def alignment_settings(values: dict[str, Any]) -> AlignmentSettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    return checked(AlignmentSettings, values)
