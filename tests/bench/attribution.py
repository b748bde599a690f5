"""What each way of attributing costs: `python -m tests.bench.attribution [--shape llava-1.5-7b --device cuda]`.

One table of images a second, from the same inputs in one process: a plain forward (and one that asks, as the census
does, for no cache and no logits), the census step (every neuron scored at the nouns, token statistics, sums by
concept, top-k), generating a caption and scoring it, gradient × activation (of every noun, as the census scores them,
and of one noun an image, as it was published), and the published per-image procedure. The demo's model and scenes by
default; `--shape llava-1.5-7b` builds random weights of that shape, with 576 image tokens, 16 of prompt, 16 of caption
and three nouns a sample, of which a backward pass takes 8 samples at a time.

    one H100:   python -m tests.bench.attribution --shape llava-1.5-7b --device cuda --batch-size 32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmray.features.census.reduction import ConceptSums, candidates_kept
from mmray.models.capture import capture_activations
from mmray.models.loading import LoadedModel, load
from mmray.models.parts import locate, output_rows, unembedding_rows
from mmray.models.prompting import Batch, TokenSpan
from mmray.neurons.activation_cache import forward
from mmray.neurons.scoring import score_batch
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition

PROMPT_TOKENS, CAPTION_TOKENS, NOUNS = 16, 16, 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA's two halves."""

    vision: dict[str, int]
    text: dict[str, int]


SHAPES = {
    "llava-1.5-7b": Shape(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        {"vocab_size": 32064, "max_position_embeddings": 4096},
    )
}
"""What is left out is as in LLaMA 7B."""


def shaped(device: str, shape: Shape) -> LoadedModel:
    """Return a LLaVA of that shape with random weights in fp16."""
    vision, text = CLIPVisionConfig(**shape.vision), LlamaConfig(**shape.text)
    settings = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            network = LlavaForConditionalGeneration(settings).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer = SimpleNamespace(all_special_ids=[0, 1, 2], pad_token_id=0)
    return LoadedModel("random weights", Path(), network, SimpleNamespace(tokenizer=tokenizer), locate(network))


def random_batch(model: LoadedModel, size: int, seed: int) -> tuple[Batch, list[TokenPosition]]:
    """Return inputs of random tokens and pixels, and three places a sample."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.network.config.vision_config
    pixels, image_tokens = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    length = image_tokens + PROMPT_TOKENS + CAPTION_TOKENS
    ids = torch.randint(1000, 30000, (size, length), generator=generator)
    ids[:, 5 : 5 + image_tokens] = 32000
    start = image_tokens + PROMPT_TOKENS
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size, 3, pixels, pixels, generator=generator),
    }
    runs = [
        run
        for row in range(size)
        for run in (TokenSpan(row, 5, 5 + image_tokens, "image"), TokenSpan(row, start, length, "text"))
    ]
    places = [
        TokenPosition(
            row, start + 3 + 4 * noun, int(ids[row, start + 4 + 4 * noun]), f"noun{(row * NOUNS + noun) % 80}", str(row)
        )
        for row in range(size)
        for noun in range(NOUNS)
    ]
    batch = Batch(inputs, length, [start] * size, ids[:, start:].tolist(), [[]] * size, runs)
    return batch, places


def demo_batches(device: str, size: int, count: int) -> tuple[LoadedModel, list[tuple[Batch, list[TokenPosition]]]]:
    """Return the demo model, and batches of its scenes with the places of their nouns."""
    from mmray.data.samples import Sample
    from mmray.data.shards import cut, read_shard
    from mmray.features.census.inputs import open_data
    from mmray.features.census.settings import census_settings
    from mmray.features.census.shard import ShardAnalysis
    from mmray.neurons.concepts import noun_source
    from mmray.neurons.token_positions import locate_mentions

    settings = census_settings({"model": "demo", "data": "demo", "out": "unused", "batch_size": size})
    model, source = load("demo", device=device), open_data(settings)
    nouns = noun_source("auto", source.objects_vocabulary(), source.translations())
    shard = cut(source.files(), size * count, size * count).shards[0]
    samples = [row for row in read_shard(source, shard) if isinstance(row, Sample)]
    batches = []
    for items, batch in ShardAnalysis(model, settings, nouns, 0).encoded(samples):
        places = [
            place
            for row, item in enumerate(items)
            for place in locate_mentions(batch, row, item.sample.sample_id, item.mentions)
        ]
        batches.append((batch, places))
    return model, batches


class Census:
    """The census step on one batch after the other, with the accumulators of a shard."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.statistics = TokenStatistics(model.widths)
        self.sums = ConceptSums(model.widths, candidates_kept(None, sum(model.widths)))

    def step(self, batch: Batch, places: list[TokenPosition], *, tokens: bool = True) -> None:
        """Score, reduce, and take the top-k of one batch; `tokens` counts every token's activity too."""
        rows = len(batch.caption_start)
        if tokens:
            self.statistics.begin([{"language": "en"}] * rows, batch.spans)
        scored = score_batch(self.model, batch, places, statistics=self.statistics if tokens else None)
        if tokens:
            self.statistics.commit()
        self.sums.add([place.concept for place in places], scored.scores, scored.activation)
        torch.cat(scored.scores, dim=1).topk(20, dim=1).values.cpu()


@torch.inference_mode()
def generated(model: LoadedModel, batch: Batch, longest: int) -> None:
    """Greedy captions of a batch, from its prompts alone."""
    stop = min(batch.caption_start)
    inputs = batch.to(model.device, model.network.dtype)
    inputs = {
        name: value[:, :stop] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()
    }
    network: Any = model.network
    network.generate(**inputs, max_new_tokens=longest, min_new_tokens=longest, do_sample=False)


class Published:
    """The released per-image procedure: batch 1, no cache, all activations to the CPU at each step, a table of every
    neuron × the whole vocabulary, and a sort of every neuron in Python."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        unembedding = unembedding_rows(model.network, model.parts)
        self.table = [
            (unembedding @ output_rows(model.network, projection).T).cpu() for projection in model.projections
        ]

    @torch.inference_mode()
    def image(self, batch: Batch, places: list[TokenPosition], row: int) -> None:
        """Caption one image step by step, then score its nouns."""
        network: Any = self.model.network
        inputs = batch.to(self.model.device, network.dtype)
        start, steps = batch.caption_start[row], len(batch.tokens[row])
        pixels = inputs["pixel_values"][row : row + 1]
        activations: list[list[torch.Tensor]] = []

        def receive(layer: int, activation: torch.Tensor, opened: torch.Tensor) -> None:
            activations[-1].append(torch.nn.functional.silu(opened).cpu())

        with capture_activations(network, self.model.projections, receive):
            for step in range(steps):
                activations.append([])
                ids = inputs["input_ids"][row : row + 1, : start + step]
                network(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, use_cache=False
                ).logits[:, -1].argmax().item()
        for place in places:
            if place.row == row:
                step = min(max(place.position - start + 1, 0), steps - 1)
                scores = [
                    (layer[-1] * table[place.token]).tolist()
                    for layer, table in zip(activations[step], self.table, strict=True)
                ]
                pairs = [
                    (score, layer, unit)
                    for layer, row_scores in enumerate(scores)
                    for unit, score in enumerate(row_scores)
                ]
                sorted(pairs, reverse=True)[:10_000]


def timed(step: Callable[[], object], images: int) -> float:
    """Return the images a second of a step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--published-images", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.shape == "demo":
        model, batches = demo_batches(arguments.device, arguments.batch_size, 4)
    else:
        model = shaped(arguments.device, SHAPES[arguments.shape])
        batches = [random_batch(model, arguments.batch_size, seed) for seed in range(2)]
    size = sum(len(batch.caption_start) for batch, _ in batches)
    census, gradient_size = Census(model), 8
    small = random_batch(model, gradient_size, 9) if arguments.shape != "demo" else batches[0]
    firsts = list({place.row: place for place in reversed(small[1])}.values())

    def plain() -> None:
        with torch.inference_mode():
            for batch, _ in batches:
                model.network(**batch.to(model.device, model.network.dtype))

    def spare() -> None:
        with torch.inference_mode():
            for batch, _ in batches:
                forward(model, batch)

    def generate_then_score() -> None:
        batch, places = batches[0]
        generated(model, batch, CAPTION_TOKENS)
        census.step(batch, places)

    rows: dict[str, tuple[Callable[[], object], int]] = {
        "plain forward": (plain, size),
        "the same without cache and logits": (spare, size),
        "census": (lambda: [census.step(*pair) for pair in batches], size),
        "census without token statistics": (lambda: [census.step(*pair, tokens=False) for pair in batches], size),
        "generate": (lambda: generated(model, batches[0][0], CAPTION_TOKENS), len(batches[0][0].caption_start)),
        "generate, then census": (generate_then_score, len(batches[0][0].caption_start)),
        "gradient, every noun": (lambda: score_batch(model, *small, "gradient"), len(small[0].caption_start)),
        "gradient, one noun": (lambda: score_batch(model, small[0], firsts, "gradient"), len(small[0].caption_start)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for step, count in rows.values():
        timed(step, count)  # warm up
    for _ in range(arguments.rounds):
        for name, (step, count) in rows.items():
            speeds[name].append(timed(step, count))
    published = Published(model)
    batch, places = batches[0]
    published.image(batch, places, 0)
    count = arguments.published_images
    speeds["published, per image"] = [
        timed(lambda: [published.image(batch, places, row) for row in range(count)], count)
    ]
    on_gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.shape} on {where}, batch {arguments.batch_size}, medians of {arguments.rounds} rounds")
    print(f"{'':34s}{'images/s':>10s}{'/ plain':>9s}{'/ published':>13s}")
    base, slowest = statistics.median(speeds["plain forward"]), speeds["published, per image"][0]
    for name, values in speeds.items():
        speed = statistics.median(values)
        print(f"{name:34s}{speed:10.2f}{speed / base:9.3f}{speed / slowest:13.1f}")


if __name__ == "__main__":
    main()
