"""Write an edit into a checkpoint: a complete folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmray.errors import InputError
from mmray.features.editing.edit import WeightEdit
from mmray.models.checkpoint import INDEXES, checkpoint_files
from mmray.models.linear import READ_ONLY, has_quantised
from mmray.models.loading import LoadedModel

WEIGHT_FILES = (".safetensors", ".bin")


def write_checkpoint(model: LoadedModel, edit: WeightEdit, out: str | Path) -> None:
    """Write the edited weights, in the number format in which the model is loaded, and the model's processor.

    Raises InputError if the edit was made on another model, if the model's weights are quantised, or if `out` is not an
    empty local folder.
    """
    # Checked before the folder is made, so that a refused edit leaves nothing behind.
    edit.check(model)
    if has_quantised(model.network):
        raise InputError(f"{model.name}: {READ_ONLY}")
    if "://" in str(out):
        raise InputError(f"{out}: a checkpoint is written to a local folder; copy it from there")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out}: not an empty folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    # Tokenizer and processor files are copied to the byte: saving them anew may change them.
    for name, path in checkpoint_files(model.folder).items():
        # An index of the original would name shards that save_pretrained may not write.
        if path.suffix not in WEIGHT_FILES and name not in INDEXES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / name)
    with edit.applied(model):
        model.network.save_pretrained(folder)
    # Loading drops most generation settings, so save_pretrained would lose them.
    settings = model.folder / "generation_config.json"
    if settings.is_file():
        shutil.copy(settings, folder)
