"""Typed settings of an alignment, the documentation of each, and the fingerprint that its folder keeps."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.errors import InputError
from mmray.settings import Workers, first_problem

EXECUTION = {"out", "workers", "gpus_per_worker", "address", "restarts", "checkpoint_every", "retry_failed"}
"""Settings that say how the work is done and leave the result alone."""
VALIDATION = {"validate_on", "validate_limit", "pope_objects", "draws"}
"""Settings of what comes after the training."""
NAMED = {"tower", "model", "data"}
"""Settings known by the digests of what they name."""


Shape = Literal["projector", "mlp"]
"""LLaVA's own projector, or the deeper MLP of Giulivi & Boracchi (2024)."""


class AlignmentSettings(BaseModel):
    """Everything that `mmray align` can be told; what the training is told by default is as published."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tower: str
    """Checkpoint of the tower that the detector sees by: an OWL-ViT or OWLv2, or a LLaVA's own; a folder, hub id, or
    `demo`."""
    model: str
    """LLaVA whose image tokens are to be made: checkpoint folder, hub id, or `demo`."""
    data: str
    """Images to learn from, no text is read: `demo`, Parquet, WebDataset tars, image folder, COCO, or
    `hf:NAME[:SPLIT]`; local or s3://."""
    out: str
    """Folder of the aligned network and its checkpoints: a local path or s3://bucket/prefix."""
    validate_on: str
    """Data with objects that the joint model is measured on beside the original, before anything is claimed of it."""
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
    checkpoint_every: int = Field(200, ge=1)
    """Steps between two checkpoints: what a crash costs."""
    validate_limit: int = Field(500, ge=1)
    """Samples that are measured."""
    pope_objects: int = Field(1, ge=1)
    """Present objects of an image that POPE asks for, and as many absent ones a setting (published: 3)."""
    draws: int = Field(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    workers: Workers = None
    """Workers of the training: a number, or MIN:MAX, of which the training takes MIN and the validation as many as the
    cluster has. Default: one a GPU of the cluster; without GPUs one a core, at most four a machine."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker, of which its training takes the first; default: 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to join (auto, or ray://HOST:PORT); default: a local Ray of this process."""
    restarts: int = Field(20, ge=0)
    """Times that a training whose workers die begins again at its last checkpoint; the same command does so too."""
    retry_failed: bool = False
    """Try again what an earlier call's validation set aside."""

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that the weights depend on; what they name is known by its digests instead."""
        return self.model_dump(exclude=EXECUTION | VALIDATION | NAMED)

    def fingerprint(self, digests: dict[str, str]) -> str:
        """Return a digest of all that the weights depend on; the same for every way of doing the work."""
        facts = self.result_settings() | {"digests": digests}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def alignment_settings(values: dict[str, Any]) -> AlignmentSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    try:
        return AlignmentSettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
