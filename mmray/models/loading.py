"""Load a vision-language or text-only model, its processor and its parts: a folder, a hub id, or the name `demo`."""

from __future__ import annotations

import hashlib
import inspect
import logging
import textwrap
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)
from transformers.utils import logging as transformers_logging

import mmray.demo
from mmray.engine.clock import phase
from mmray.errors import InputError
from mmray.models.checkpoint import WEIGHTS, check_config, checkpoint_files, reads_images
from mmray.models.experts import routed_experts
from mmray.models.layout import ModelParts, Projection
from mmray.models.linear import dequantise, has_quantised
from mmray.models.options import MODULES
from mmray.models.parts import locate
from mmray.models.streams import Streams
from mmray.models.transform import Transform
from mmray.models.workarounds import work_around
from mmray.neuron_names import NeuronNames

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names that `--dtype` takes."""

TOKEN_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Generation settings that are kept from a checkpoint."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network in evaluation mode, its processor, and where it keeps its neurons.

    The processor of a text-only model is its tokenizer.
    """

    name: str
    folder: Path
    network: PreTrainedModel
    processor: Any
    parts: ModelParts
    unused: tuple[str, ...] = ()
    """Weights of the checkpoint that the network has no parameter for."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of captions: with a Q-Former, the language model's."""
        return self.processor.tokenizer if self.parts.reads_images else self.processor

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The language decoder's MLP output projections, first layer first."""
        return self.parts.of("language")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer of the language decoder."""
        return tuple(projection.width for projection in self.projections)

    @cached_property
    def names(self) -> NeuronNames:
        """Names of the language decoder's neurons."""
        return NeuronNames(tuple(routed_experts(self.network, projection) for projection in self.projections))

    @cached_property
    def digest(self) -> str:
        """Digest of the checkpoint; its files are read once."""
        return digest(self.folder)

    @property
    def context(self) -> int | None:
        """Longest sequence of the language model; None if its configuration does not say (T5, BLOOM)."""
        length: int | None = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return length

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where inputs go."""
        device: torch.device = self.network.get_input_embeddings().weight.device
        return device

    @cached_property
    def transform(self) -> Transform | None:
        """What is between the final norm and the unembedding; None: nothing."""
        path = self.parts.transform
        return None if path is None else Transform(self.network.get_submodule(path))

    @cached_property
    def streams(self) -> Streams | None:
        """The decoder, if its blocks pass on several streams."""
        path = self.parts.streams
        return None if path is None else Streams(self.network.get_submodule(path))

    @property
    def norm(self) -> nn.Module:
        """The final norm before the unembedding."""
        norm: nn.Module = self.network.get_submodule(self.parts.final_norm)
        return norm


def kind_of(name: str) -> str:
    """Return what a model's name stands for: `demo`, a `folder`, or an id on the `hub`."""
    return "demo" if name == "demo" else "folder" if Path(name).expanduser().is_dir() else "hub"


def from_anywhere(name: str) -> str:
    """Return a model's name so that it holds in every directory: a folder becomes its full path.

    From another directory or machine, a relative path such as `models/llava` would be somebody's hub id.
    """
    return str(Path(name).expanduser().absolute()) if kind_of(name) == "folder" else name


def resolve(name: str) -> Path:
    """Return the checkpoint's folder for a local folder, `demo`, or a hub id (downloaded, or from the cache).

    Raises InputError if there is no such checkpoint.
    """
    if name == "demo":
        return mmray.demo.MODEL
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{name}: not a model folder (no config.json); give a Hugging Face checkpoint folder")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such model folder; give a Hugging Face checkpoint folder, a hub id, or demo")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in WEIGHTS if suffix != ".bin"]))
        # Only then: *.bin would be the same weights once more.
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.bin"]))
        return folder
    except Exception as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: neither a folder nor a model that the hub or its cache has ({first_line})"
        ) from error


def digest(folder: Path) -> str:
    """Return a digest of the names and contents of a checkpoint's configuration, weight and tokenizer files."""
    files = checkpoint_files(folder)
    if not any(path.suffix in (".safetensors", ".bin") for path in files.values()):
        raise InputError(f"{folder}: no weights (*.safetensors); give a complete Hugging Face checkpoint folder")
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_file_sum, files.values()))
    whole = hashlib.sha256()
    for name, total in zip(files, sums, strict=True):
        whole.update(f"{name} {total}\n".encode())
    return whole.hexdigest()[:16]


def load(
    name: str,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    *,
    trust_remote_code: bool = False,
    wrap: Callable[..., LoadedModel] = LoadedModel,
) -> LoadedModel:
    """Load a model for inference.

    `dtype` is fp32, bf16, fp16, or auto: the checkpoint's own on a GPU, fp32 on a CPU. A quantised checkpoint stays
    quantised with auto, and is dequantised with the others. Without `device`, all visible
    GPUs are used; several share the layers. Raises InputError if the folder is no vision-language or causal language
    model, its parts can't be found, or the dtype is unknown.
    """
    if dtype not in (known := ("auto", *DTYPES)):
        raise InputError(f"{name}: unknown dtype {dtype!r}; choose from {', '.join(known)}")
    folder = resolve(name)
    check_config(folder)
    checkpoint_files(folder)
    transformers_logging.disable_progress_bar()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Then accelerate distributes the layers over the GPUs.
    shared = str(device) == "cuda" and torch.cuda.device_count() > 1
    torch_dtype: Any = DTYPES.get(dtype, "auto" if "cuda" in str(device) else torch.float32)
    try:
        # First, because its errors are clearer than the model's.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        inputs: Any = AutoProcessor if reads_images(config) else AutoTokenizer
        processor = inputs.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with _quiet():
            network, report = _architecture(config).from_pretrained(
                folder,
                dtype=torch_dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **_placement(config, device, shared=shared),
            )
    except SafetensorError as error:
        raise InputError(f"{name}: damaged weights ({_shortened(error)}); copy the checkpoint again") from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{name}: {_not_a_model(error)}") from error
    refuse_missing(name, report["missing_keys"])
    tokenizer = getattr(processor, "tokenizer", None) if reads_images(config) else processor
    if not tokenizer or not tokenizer.is_fast:
        raise InputError(
            f"{name}: no fast tokenizer (tokenizer.json), which gives the characters of each token; convert it"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # Text models are often trained without padding; positions with it are never read.
        tokenizer.pad_token = tokenizer.eos_token
    network.eval().requires_grad_(False)
    work_around(network)
    _greedy_only(network)
    _time_forward(network)
    # Some networks need the input, while their processor leaves it out unless asked.
    if "mm_token_type_ids" in inspect.signature(network.forward).parameters:
        processor.return_mm_token_type_ids = True
    if getattr(network, "is_quantized", False) and (dtype != "auto" or not has_quantised(network)):
        # Some formats are dequantised when they are loaded on a CPU (fp8).
        dequantise(network, network.dtype if torch_dtype == "auto" else torch_dtype)
    if not shared and not getattr(network, "is_quantized", False):
        try:
            network.to(device)
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"{name}: does not go on {device} ({_shortened(error)})") from error
    return wrap(
        name=name,
        folder=folder,
        network=network,
        processor=processor,
        parts=locate(network, processor),
        unused=tuple(sorted(report["unexpected_keys"])),
    )


def _placement(config: PretrainedConfig, device: str | torch.device, *, shared: bool) -> dict[str, Any]:
    """Return what tells transformers where weights go; quantised ones can't be moved afterwards."""
    if shared:
        return {"device_map": "auto"}
    return {"device_map": {"": device}} if hasattr(config, "quantization_config") else {}


def _time_forward(network: PreTrainedModel) -> None:
    """Time the network's passes, also during generation, as the phase `forward` of the current unit."""
    # The running phase, kept from one hook to the other.
    running: list[AbstractContextManager[None]] = []

    def begin(*_: Any) -> None:
        running.append(phase("forward"))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    network.register_forward_pre_hook(begin)
    # Also after an exception, which would leave the phase running.
    network.register_forward_hook(end, always_call=True)


def takes_images(name: str, *, trust_remote_code: bool = False) -> bool:
    """Return whether a model takes images, from its configuration; raises InputError for no model."""
    folder = resolve(name)
    check_config(folder)
    try:
        return reads_images(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{name}: {_not_a_model(error)}") from error


def require_images(name: str, what: str, *, trust_remote_code: bool = False) -> None:
    """Raise InputError if `what` is asked of a text-only model."""
    if not takes_images(name, trust_remote_code=trust_remote_code):
        raise InputError(f"{name}: reads text only; {what} needs a model that takes images")


def describe_model(name: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return what a run records about a model, from its configuration: no weights are loaded.

    Except for families that FAMILIES does not know: the probe runs the network.
    """
    folder = resolve(name)
    check_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Modules without memory: sizes of a 70 B model are read in seconds.
        with torch.device("meta"):
            network = _architecture(config).from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{name}: {_not_a_model(error)}") from error
    try:
        parts = locate(network)
    except (InputError, RuntimeError):
        parts = load(name, "bf16", "cpu", trust_remote_code=trust_remote_code).parts
    language = parts.of("language")
    return {
        "name": name,
        "kind": kind_of(name),
        "family": parts.family,
        "type": config.model_type,
        "layers": len(language),
        "widths": [projection.width for projection in language],
        "experts": [list(routed_experts(network, projection) or ()) or None for projection in language],
        "module_widths": {module: [mlp.width for mlp in parts.mlps(module)] for module in MODULES[1:]},
        "projections": [projection.path for projection in language],
        "final_norm": parts.final_norm,
        "unembedding": parts.unembedding,
        "image": parts.image,
        "image_tokens": int(getattr(config, "image_seq_length", None) or 576) if parts.reads_images else 0,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _architecture(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads models of this configuration."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' table of missing and unexpected weights: missing ones raise a one-line error here."""
    logger = logging.getLogger(modeling_utils.__name__)

    def only_errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # A filter, not a level: at a higher level transformers checks parallel layers, and warns about them.
    logger.addFilter(only_errors)
    try:
        yield
    finally:
        logger.removeFilter(only_errors)


def refuse_missing(name: str, missing: Collection[str]) -> None:
    """Raise InputError if a checkpoint lacks weights: transformers would draw them at random in every process."""
    if missing:
        named = ", ".join(sorted(missing)[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"{name}: weights that the model needs are missing from the checkpoint ({len(missing)}: {named}); "
            "copy it again, or convert it for this version of transformers"
        )


def _greedy_only(network: PreTrainedModel) -> None:
    """Reset a checkpoint's generation settings, except for the tokens that begin, end and pad."""
    # Others (repetition penalty, minimum length, …) would change greedy captions, which must be the most likely token
    # at each step: that is what scores and edits are about.
    for module in network.modules():
        settings = getattr(module, "generation_config", None)
        if isinstance(settings, GenerationConfig):
            tokens = {name: getattr(settings, name, None) for name in TOKEN_SETTINGS}
            module.generation_config = GenerationConfig(**tokens)


def _not_a_model(error: Exception) -> str:
    return f"not a vision-language or causal language model that transformers can load ({_shortened(error)})"


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" …")


def _file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
