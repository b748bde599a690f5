"""What comes from outside is data: nothing of it is run, unpacked without bounds, or kept that is secret."""

import ast
import json
import logging
import os
import pickle
import shutil
import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.data.images import LARGEST_IMAGE
from mmray.data.sources import open_source
from mmray.errors import InputError, StorageError
from mmray.features.census.settings import CensusSettings
from mmray.models.loading import load
from mmray.runs.run import open_run
from mmray.storage import filesystem, open_store, s3_client
from tests.support.command import Answer
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

ROOT = Path(__file__).parents[2]
DANGEROUS = {
    *(
        "pickle",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "cloudpickle",
        "dill",
        "marshal",
        "shelve",
        "joblib",
    ),
    *("eval", "exec", "compile", "__import__", "os.system", "tarfile.extract", "tarfile.extractall"),
    *("torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"),
}
"""Modules and calls that can run what they are given."""
ALLOWED = {("mmray/terminal/config.py", "yaml.load"), ("jobs/demo/scenes.py", "numpy.load")}
"""With YAML's safe loader, and with pickled arrays refused, as is the default."""


def dangers(path: Path) -> set[str]:
    """Return what a module imports or calls of these."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
            found |= {str(node.module)} - {"pickle"}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name, f"tarfile.{name.rpartition('.')[2]}" if "extract" in name else name}
    return found & DANGEROUS


def test_nothing_that_is_read_can_be_run() -> None:
    modules = [*ROOT.glob("mmray/**/*.py"), *ROOT.glob("jobs/*.py")]
    assert len(modules) > 80
    found = {(path.relative_to(ROOT).as_posix(), name) for path in modules for name in dangers(path)}
    assert found <= ALLOWED


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_not_unpickled(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llava"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(InputError) as refusal:
        load(str(folder))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["llava", "a-model-of-its-own"])
def test_code_of_a_checkpoint_is_not_run(tiny: Callable[[str], Path], tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llava"), folder)
    for name in ("configuration_own", "modeling_own", "processing_own"):
        (folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    classes = {"AutoConfig": "configuration_own.Own", "AutoModelForImageTextToText": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    if model_type == "llava":
        load(str(folder))  # the architecture of transformers, whatever the folder offers
    else:
        with pytest.raises(InputError, match="not a vision-language or causal language model"):
            load(str(folder))
    assert not (tmp_path / "ran").exists()
    assert CensusSettings.model_fields["trust_remote_code"].default is False


def picture(side: int) -> bytes:
    """Return a PNG of so many pixels a side, all black: a few kilobytes that unfold to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_decompression_bombs_are_rows_in_errors(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    rows = scenes(4)
    side = 13_400
    assert side**2 > LARGEST_IMAGE
    rows[1]["image"] = {"bytes": picture(side), "path": None}
    assert len(rows[1]["image"]["bytes"]) < 1 << 20
    outcome = census_here(tiny("llava"), str(write(tmp_path / "data.parquet", rows)), tmp_path / "run")
    assert (outcome.samples, outcome.failures, outcome.quarantined) == (4, 1, {})
    (error,) = open_run(tmp_path / "run").table("errors").to_pylist()
    assert (error["sample_id"], error["stage"]) == (rows[1]["sample_id"], "decode")
    assert "pixels" in error["message"]


@pytest.mark.parametrize("address", ["https://me:hush-hush@host/x", "gs://hush-hush@b", "ftp://me:a@hush-hush@host/x"])
@pytest.mark.parametrize("option", ["data", "out"])
def test_passwords_in_any_address_are_not_repeated(mmray: Callable[..., Answer], address: str, option: str) -> None:
    given = {"model": "demo", "data": "demo", "out": "s3://bucket/run"} | {option: address}
    refusal = mmray(
        "census", "--local", *(word for name, value in given.items() for word in (f"--{name}", value))
    ).refusal
    assert "hush" not in refusal
    assert address.rpartition("@")[2].partition("/")[0] in refusal
    with pytest.raises(InputError) as error:
        open_source(address)
    assert "hush" not in str(error.value)


def test_escape_sequences_of_the_data_do_not_reach_the_terminal(
    tiny: Callable[[str], Path], mmray: Callable[..., Answer], tmp_path: Path
) -> None:
    rows = scenes(4)
    for row in rows:
        row["caption"] = f"\x1b]0;pwned\x07\x1b[2J{row['caption']}\x9b31m"
        row["sample_id"] = f"\x1b[2J{row['sample_id']}"
    rows[0]["image"] = {"bytes": b"none", "path": None}
    census_here(tiny("llava"), write(tmp_path / "data.parquet", rows), tmp_path / "run")
    example = open_run(tmp_path / "run").table("examples").to_pylist()[0]
    shown = mmray("neuron", tmp_path / "run", f"L{example['layer']}.u{example['unit']}").out
    assert "pwned" in shown and r"\x1b" in shown
    status = mmray("status", tmp_path / "run").out
    refusal = mmray("rank", tmp_path / "run", "\x1b[2J").refusal
    assert "\x1b" in refusal.encode().decode("unicode_escape") and r"\x1b" in refusal
    for text in (shown, status, refusal):
        assert not any(character in text for character in "\x1b\x07\x9b")


@pytest.mark.parametrize("address", ["s3://KEY:hush-hush@bucket/run", "s3://hush-hush@bucket"])
def test_secrets_in_an_address_are_refused_and_not_repeated(address: str) -> None:
    for use in (open_store, filesystem):
        with pytest.raises(InputError, match="credentials don't belong in an address") as refusal:
            use(address)
        assert "hush-hush" not in str(refusal.value)


def test_secrets_in_an_endpoint_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush-hush@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3_client.cache_clear()
    try:
        with pytest.raises(StorageError) as refusal:
            open_store("s3://bucket/run").read("x")
        assert "hush-hush" not in str(refusal.value)
    finally:
        s3_client.cache_clear()


@pytest.mark.slow
def test_no_object_of_a_run_and_no_log_holds_a_secret(
    tiny: Callable[[str], Path],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "hush-hush-1", "AWS_SESSION_TOKEN": "hush-hush-2", "HF_TOKEN": "hush-hush-3"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    s3_client.cache_clear()
    caplog.set_level(logging.DEBUG, "mmray")
    try:
        folder = f"s3://{bucket}/{uuid.uuid4().hex}"
        open_store(folder).put("data.parquet", Path(write(tmp_path / "data.parquet", scenes(4))).read_bytes())
        census_here(tiny("llava"), f"{folder}/data.parquet", f"{folder}/run")
        store = open_store(f"{folder}/run")
        for entry in store.list():
            assert b"hush-hush" not in store.read(entry.key), entry.key
    finally:
        s3_client.cache_clear()
    assert "hush-hush" not in caplog.text
    assert "hush-hush" not in "".join(capfd.readouterr())
    assert os.environ["HF_TOKEN"] == "hush-hush-3"
