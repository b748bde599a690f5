"""What the tests of neurons are made with: samples, settings, batches, and hooks of their own."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from mmray.data.columns import Columns
from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.data.sources import open_source
from mmray.features.census.merging import RunMerge
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import NounSource, find_forms, noun_source
from mmray.neurons.row_sharing import RowSharing
from mmray.neurons.token_positions import TokenPosition, locate_mentions
from mmray.runs.tables import from_bytes, to_bytes

NOUNS = frozenset({"dog", "cat", "ball", "chair", "tree", "boy", "girl", "horse", "water", "hat", "table", "bird"})
LEXICON = NounSource("lexicon", lexicon={None: NOUNS})
CAPTIONS = (
    "An image of a dog and a cat.",
    "A red ball on a chair",
    "Two dogs by the tree and a third dog.",
    "a cat",
    "A boy and a girl ride a horse near the water.",
    "The man with a hat sits at the table, and birds fly.",
    "dog",
    "A chair, a chair and one more chair beside a table with a cat under it and a ball on it",
    "the horse in front of the tree",
    "What is in the picture? Two birds and a fish in the sea.",
    "A photo of a girl with a dog.",
    "water",
)


def picture(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    """Return noise that differs from seed to seed."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def png(image: Image.Image) -> bytes:
    """Return the picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int, caption: str, **facts: Any) -> Sample:
    """Return a sample; pictures are landscape and portrait in turns."""
    image = png(picture(number, *((40, 56) if number % 2 else (56, 40))))
    return Sample(**{"sample_id": f"s{number}", "source": f"row {number}", "image": image, "caption": caption} | facts)


def samples(count: int = len(CAPTIONS), **facts: Any) -> list[Sample]:
    """Return samples with captions of different lengths."""
    return [sample(number, CAPTIONS[number], **facts) for number in range(count)]


def settings(**values: Any) -> CensusSettings:
    """Return the settings of a census that is told where its samples are by the test."""
    return census_settings({"model": "tiny", "data": "none", "out": "nowhere", "batch_size": 4, "top_k": 5} | values)


def analyse(
    model: LoadedModel,
    found: Sequence[Any],
    nouns: Any = LEXICON,
    shard_id: int = 0,
    sharing: RowSharing | None = None,
    **values: Any,
) -> dict[str, pa.Table]:
    """Return the tables of a shard, as they come back from storage."""
    tables = ShardAnalysis(model, settings(**values), nouns, shard_id, sharing).run(found)
    return {name: from_bytes(to_bytes(table)) for name, table in tables.items()}


def merged(model: LoadedModel, shards: Sequence[dict[str, pa.Table]], top_k: int = 5) -> dict[str, pa.Table]:
    """Return the tables of the run that consists of these shards."""
    texts = pa.array([["a"]] * sum(model.widths), pa.list_(pa.string()))
    merge = RunMerge(model.widths, pa.table({"tokens": texts, "suppressed": texts}), top_k)
    for shard in shards:
        merge.add(shard.__getitem__)
    found: dict[str, list[pa.Table]] = {}
    for name, table in merge.tables():
        found.setdefault(name, []).append(table)
    return {name: pa.concat_tables(tables) for name, tables in found.items()}


@cache
def demo_samples(count: int) -> tuple[tuple[Sample, ...], NounSource]:
    """Return the first samples of the demo's data, and what its nouns are found with."""
    source = open_source("demo", Columns(), True)
    rows = read_shard(source, cut(source.files(), count, count).shards[0])
    nouns = noun_source("auto", source.objects_vocabulary(), source.translations())
    return tuple(row for row in rows if isinstance(row, Sample)), nouns


def batch_of(
    model: LoadedModel, captions: Sequence[str], first: int = 0, languages: Sequence[str] = ()
) -> tuple[Batch, list[TokenPosition]]:
    """Return these captions with a picture each as one batch, and the places where nouns are predicted."""
    prompts = [prompt_text(model, None, language) for language in languages or ["en"] * len(captions)]
    pairs = [tokenize_caption(model, prompt, caption) for prompt, caption in zip(prompts, captions, strict=True)]
    images = [picture(first + number) for number in range(len(captions))]
    batch = encode(model, prompts, images, *(list(part) for part in zip(*pairs, strict=True)))
    places = [
        place
        for row, caption in enumerate(captions)
        for place in locate_mentions(batch, row, f"s{first + row}", find_forms(caption, NOUNS, "en"))
    ]
    return batch, places


@contextmanager
def outputs_of(model: LoadedModel, paths: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep what these modules return while the block lasts, rows of tokens."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = []
    for path, kept in seen.items():
        module = model.network.get_submodule(path)
        handles.append(
            module.register_forward_hook(lambda *call, kept=kept: kept.append(call[2].reshape(-1, call[2].shape[-1])))
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hooks(network: torch.nn.Module) -> int:
    """Count the hooks in a network."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def samples_of(path: Path, count: int) -> list[Sample]:
    """Return the first good samples of some data."""
    source = open_source(str(path))
    (shard,) = cut(source.files(), count, count).shards
    return [row for row in read_shard(source, shard) if isinstance(row, Sample)]


def weights(model: LoadedModel) -> str:
    """Digest every byte of the weights."""
    whole = hashlib.sha256()
    for name, value in model.network.state_dict().items():
        whole.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def logits(model: LoadedModel) -> torch.Tensor:
    """Return the logits of two captions with their pictures."""
    batch, _ = batch_of(model, CAPTIONS[:2])
    with torch.inference_mode():
        return model.network(**batch.to(model.device, model.network.dtype)).logits
