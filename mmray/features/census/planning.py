"""Estimate a census before it starts: tokens from the first samples, arithmetic from the configuration, one timing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch

from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest, read_shard
from mmray.data.source import Source
from mmray.features.census.plan import CensusEstimate, DataSample
from mmray.features.census.reduction import candidates_kept
from mmray.features.census.settings import CensusSettings
from mmray.neurons.concepts import NounSource
from mmray.neurons.language_id import language_code, language_name

LOOKED_AT = 64
"""Rows read to learn how long captions are, in which languages, and which nouns they have."""
FREQUENT = 10
"""Nouns listed."""
EFFICIENCY = 0.6
"""Part of a large product's speed that a whole forward reaches; 0.5 to 0.7 was seen on CPUs and an H100."""
CHARACTERS_A_TOKEN = 4


def estimate(
    settings: CensusSettings,
    source: Source,
    manifest: Manifest,
    nouns: NounSource,
    widths: Sequence[int],
    parameters: int,
    image_tokens: int,
) -> CensusEstimate:
    """Return what the census would cost; nothing is run but one product of matrices for half a second.

    Arithmetic is 2 · parameters a token (twice for `generate`); bytes are the committed parts and the final tables.
    """
    samples, failures = first_rows(source, manifest)
    seen = describe(samples, failures, nouns)
    occurrences = seen.nouns / max(len(samples), 1)
    characters = sum(len(sample.caption) for sample in samples) / max(len(samples), 1)
    positions = image_tokens + 16 + characters / CHARACTERS_A_TOKEN
    passes = 2 if settings.captions == "generate" else 1
    neurons = sum(widths)
    kept = candidates_kept(settings.candidates, neurons)
    # Most concepts of a shard occur there once or twice.
    concepts = min(settings.shard_size, manifest.samples) * occurrences / 2
    labels = 2 * (1 + len({sample.language for sample in samples}) + len({sample.domain for sample in samples}))
    shard_bytes = concepts * kept * 20 + neurons * (labels * 24 + 10 * 12)
    return CensusEstimate(
        samples=manifest.samples,
        shards=len(manifest.shards),
        positions=positions,
        parameters=parameters,
        teraflops=2 * parameters * positions * manifest.samples * passes / 1e12,
        speed=EFFICIENCY * _product_speed(settings.dtype),
        # Without GPUs all workers of a machine share its cores, and its speed is that of all.
        workers=(settings.worker_range or (0, torch.cuda.device_count()))[1] if torch.cuda.is_available() else 1,
        occurrences=occurrences,
        bytes_written=int(len(manifest.shards) * shard_bytes + manifest.samples * occurrences * settings.top_k * 14),
        sample=seen,
        neurons=neurons,
        kept=kept,
    )


def first_rows(source: Source, manifest: Manifest) -> tuple[list[Sample], list[Failure]]:
    """Return the first samples of the data, and what was unreadable among its first rows."""
    rows = list(islice(read_shard(source, manifest.shards[0]), LOOKED_AT))
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Failure)]


def describe(samples: Sequence[Sample], failures: Sequence[Failure], nouns: NounSource) -> DataSample:
    """Return what some rows hold: how many can be read, their languages, and the nouns of their captions."""
    captioned = [sample for sample in samples if sample.caption.strip()]
    found = [nouns.find(sample.caption, sample.language, sample.objects) for sample in captioned]
    languages = Counter(language_code(sample.caption, sample.language) for sample in captioned)
    unknown = [code for code in languages if not nouns.knows(code)]
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
        unknown_languages={language_name(code): n for code, n in languages.most_common() if code in unknown},
        source=nouns.kind,
    )


def _product_speed(dtype: str) -> float:
    """Return 10¹² operations a second of a product of large matrices on this machine's best device."""
    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 1024
    kind = torch.float32 if dtype == "fp32" or not cuda else torch.bfloat16
    matrix = torch.ones(size, size, dtype=kind, device="cuda" if cuda else "cpu")
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12
