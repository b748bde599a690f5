"""Estimates a census: tokens from the first samples, arithmetic from the configuration, speed from one timing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch

from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest, read_shard
from mmray.data.source import Source
from mmray.features.census.bytes_written import by_arithmetic, expected_concepts, expected_repeated, of_tables
from mmray.features.census.cost import CensusEstimate, DataSample, Volume, WorkerMemory
from mmray.features.census.reduction import SUMS_MEMORY, candidates_kept
from mmray.features.census.settings import CensusSettings
from mmray.features.census.shard import labels_of
from mmray.models.prompting import POSITIONS
from mmray.neurons.concepts import NounSource
from mmray.neurons.language_id import language_code, language_name
from mmray.neurons.scores import SCORES
from mmray.neurons.tables import EXAMPLES
from mmray.neurons.token_sums import COPIED

ROWS_READ = 64
"""First rows read to estimate caption lengths, languages and nouns."""
NAMED = 256
"""First rows whose nouns tell how many different ones there are."""
FREQUENT = 10
"""Nouns listed."""
EFFICIENCY = 0.6
"""Speed of a whole forward pass as a fraction of a large matrix product's: 0.5 to 0.7 on CPUs and an H100."""
CHARACTERS_PER_TOKEN = 4
PROMPT_TOKENS = 16


def estimate(
    settings: CensusSettings,
    source: Source,
    manifest: Manifest,
    nouns: NounSource,
    widths: Sequence[int],
    parameters: int,
    image_tokens: int,
) -> CensusEstimate:
    """Return what the census would cost. Runs nothing but one matrix product, for half a second.

    Arithmetic is 2 · parameters per token, and twice that if the model writes the captions. Bytes are the committed
    parts and the final tables.
    """
    samples, failures = first_rows(source, manifest)
    seen = describe(samples, failures, nouns)
    occurrences = seen.nouns / max(len(samples), 1)
    characters = sum(len(sample.caption) for sample in samples) / max(len(samples), 1)
    positions = (image_tokens + PROMPT_TOKENS) * _prompts(settings, samples) + characters / CHARACTERS_PER_TOKEN
    passes = 2 if settings.captions == "generate" else 1
    neurons = sum(widths)
    kept = candidates_kept(settings.candidates, neurons)
    seen_concepts = _concepts(source, manifest, nouns)
    concepts = expected_concepts(seen_concepts, min(settings.samples_per_shard, manifest.samples) * occurrences)
    # Activity is kept per label and modality; "all" is the label that every sample has.
    kinds: dict[str, set[str]] = {}
    for sample in samples:
        for kind, label in labels_of(sample).items():
            kinds.setdefault(kind, set()).add(label)
    held = 2 * (1 + sum(map(len, kinds.values())))
    # The only label of a kind repeats the numbers of "all".
    written = 2 * (1 + sum(len(labels) for labels in kinds.values() if len(labels) > 1))
    # Occurrences of shards, and how many shards have so many.
    sizes = Counter(shard.samples * occurrences for shard in manifest.shards)
    volume = Volume(
        shards=len(manifest.shards),
        samples=manifest.samples,
        concepts=sum(number * expected_concepts(seen_concepts, size) for size, number in sizes.items()),
        repeated=sum(number * expected_repeated(seen_concepts, size) for size, number in sizes.items()),
        tables=of_tables(
            neurons,
            held,
            occurrences * settings.top_k,
            expected_concepts(seen_concepts, manifest.samples * occurrences),
            manifest.samples,
        ),
        parts=by_arithmetic(neurons, kept, written, occurrences * settings.top_k),
    )
    # On a GPU `auto` is the checkpoint's format, and few checkpoints are in fp32.
    number_bytes = 4 if settings.dtype == "fp32" else 2
    # Long texts share a batch with few others.
    together = min(settings.batch_size, max(1, int(POSITIONS * CHARACTERS_PER_TOKEN // max(characters, 1))))
    memory = WorkerMemory(
        weights=parameters * number_bytes,
        # A layer's gate, its other half and their product; per noun the scores and activations of all neurons.
        batch=int(together * (3 * positions * max(widths) * number_bytes + 8 * occurrences * neurons) + 4 * COPIED),
        # Those of a shard, and of the one before it, which is still being finished.
        # 24 bytes: three sums in fp64, per concept and per label; 12: activation, sample and position of an example.
        sums=2 * int(min(SUMS_MEMORY, concepts * neurons * 24) + neurons * (held * 24 + 2 * EXAMPLES * 12)),
    )
    return CensusEstimate(
        samples=manifest.samples,
        shards=len(manifest.shards),
        positions=positions,
        parameters=parameters,
        teraflops=2 * parameters * positions * manifest.samples * passes / 1e12,
        speed=EFFICIENCY * _product_speed(settings.dtype),
        # Without GPUs the workers share the cores that the timing used, so more workers are no faster.
        workers=(settings.worker_range or (0, torch.cuda.device_count()))[1] if torch.cuda.is_available() else 1,
        occurrences=occurrences,
        volume=volume,
        memory=memory,
        sample=seen,
        neurons=neurons,
        kept=kept,
    )


def _prompts(settings: CensusSettings, samples: Sequence[Sample]) -> float:
    """Return the prompts with an image that are run per sample: captions of one image share theirs, if they can."""
    if not samples or settings.captions == "generate" or SCORES[settings.score].backward:
        return 1.0
    return len({sample.image_key for sample in samples}) / len(samples)


def _concepts(source: Source, manifest: Manifest, nouns: NounSource) -> Counter[str]:
    """Return how often each concept occurs in the first captions; their images are not kept."""
    found: Counter[str] = Counter()
    for row in islice(read_shard(source, manifest.shards[0]), NAMED):
        if isinstance(row, Sample) and row.caption.strip():
            found.update(mention.concept for mention in nouns.find(row.caption, row.language, row.objects))
    return found


def first_rows(source: Source, manifest: Manifest) -> tuple[list[Sample], list[Failure]]:
    """Return the readable and the unreadable of the first rows of the data."""
    rows = list(islice(read_shard(source, manifest.shards[0]), ROWS_READ))
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Failure)]


def describe(samples: Sequence[Sample], failures: Sequence[Failure], nouns: NounSource) -> DataSample:
    """Count readable rows, and the languages and nouns of their captions."""
    captioned = [sample for sample in samples if sample.caption.strip()]
    found = [nouns.find(sample.caption, sample.language, sample.objects) for sample in captioned]
    languages = Counter(language_code(sample.caption, sample.language) for sample in captioned)
    return DataSample(
        rows=len(samples) + len(failures),
        unreadable=len(failures),
        reason=f"{failures[0].source}: {failures[0].message}" if failures else "",
        captions=len(captioned),
        nouns=sum(map(len, found)),
        without_nouns=sum(not mentions for mentions in found),
        frequent=tuple(Counter(mention.concept for mentions in found for mention in mentions).most_common(FREQUENT)),
        languages={language_name(code): count for code, count in languages.most_common()},
        guessed=any(sample.language is None for sample in captioned),
        unknown_languages={
            language_name(code): count for code, count in languages.most_common() if not nouns.knows(code)
        },
        source=nouns.kind,
    )


def _product_speed(dtype: str) -> float:
    """Return the speed of a large matrix product on this machine's best device, in 10¹² operations per second."""
    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 1024
    kind = torch.float32 if dtype == "fp32" or not cuda else torch.bfloat16
    matrix = torch.ones(size, size, dtype=kind, device="cuda" if cuda else "cpu")
    fastest = float("inf")
    # The first products include start-up costs, so the fastest of several counts.
    for _ in range(5):
        began = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest / 1e12
