"""Typed settings of an alignment, the documentation of each, and the fingerprint that its folder keeps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmray.engine.settings import JobSettings, Workers, after_work, checked, execution, known_by_digest

Shape = Literal["projector", "mlp"]
"""LLaVA's own projector, or the deeper MLP of Giulivi & Boracchi (2024)."""


class AlignmentSettings(JobSettings):
    """Everything that `mmray align` can be told; what the training is told by default is as published.

    The work is the training: what is said of the validation comes after it.
    """

    tower: str = known_by_digest()
    """Checkpoint of the tower that the detector sees by: an OWL-ViT or OWLv2, or a LLaVA's own; a folder, hub id, or
    `demo`."""
    model: str = known_by_digest()
    """LLaVA whose image tokens are to be made: checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """Images to learn from, no text is read: `demo`, Parquet, WebDataset tars, image folder, COCO, or
    `hf:NAME[:SPLIT]`; local or s3://."""
    out: str = execution()
    """Folder of the aligned network and its checkpoints: a local path or s3://bucket/prefix."""
    validate_on: str = after_work()
    """Data with objects that the joint model is measured on next to the original, before anything is claimed of it."""
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
    """Images a step, all workers together."""
    epochs: int = Field(1, ge=1)
    """Times that every image is gone through."""
    shard_size: int = Field(500, ge=1)
    """Images that are read one after the other, at most."""
    seed: int = 0
    """Seed of the network's first weights, of the order of images, and of the validation."""
    checkpoint_every: int = execution(200, ge=1)
    """Steps between two checkpoints: what a crash costs."""
    validate_limit: int = after_work(500, ge=1)
    """Samples that are measured."""
    pope_objects: int = after_work(1, ge=1)
    """Present objects of an image that POPE asks for, and as many absent ones a setting (published: 3)."""
    draws: int = after_work(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    workers: Workers = execution(None)
    """Workers of the training: a number, or MIN:MAX, of which the training takes MIN and the validation as many as the
    cluster has. Default: one per GPU of the cluster; without GPUs one per core, at most four per machine."""
    gpus_per_worker: float | None = execution(None, ge=0)
    """GPUs per worker, of which its training takes the first; default: 1 where the cluster has GPUs, else 0."""
    local: bool = execution(False)
    """Validate in this process, without Ray; the training needs Ray, and must have ended."""
    restarts: int = execution(20, ge=0)
    """Times that a training whose workers die begins again at its last checkpoint; the same command does so too."""


def alignment_settings(values: dict[str, Any]) -> AlignmentSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(AlignmentSettings, values)
