"""An edit made part of a checkpoint: a complete folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmray.errors import InputError
from mmray.features.editing.edit import WeightEdit
from mmray.models.checkpoint import INDEXES, checkpoint_files
from mmray.models.loading import LoadedModel

WEIGHT_FILES = (".safetensors", ".bin")


def write_checkpoint(model: LoadedModel, edit: WeightEdit, out: str | Path) -> None:
    """Write the model with the edit in its weights, in the number format that it is loaded in, and its processor.

    Raises InputError for another model than the edit's own, or a folder that holds anything.
    """
    edit.check(model)
    if "://" in str(out):
        raise InputError(f"{out}: a checkpoint is written to a local folder; copy it from there")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out}: not an empty folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    # The checkpoint's own files of tokens and processing, to the byte; transformers writes the rest anew.
    for name, path in checkpoint_files(model.folder).items():
        if path.suffix not in WEIGHT_FILES and name not in INDEXES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / name)
    with edit.applied(model):
        model.network.save_pretrained(folder)
    # The loaded model leaves its settings of generation alone, which go on with the checkpoint all the same.
    settings = model.folder / "generation_config.json"
    if settings.is_file():
        shutil.copy(settings, folder)
