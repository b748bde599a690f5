"""Train the demo model on rendered scenes for a given time, and save it as a checkpoint."""

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from jobs.demo.architecture import IMAGE_TOKENS, chat_prompt
from jobs.demo.captions import Exchange, question_without_image, training_exchange
from jobs.demo.scenes import Scene, World, sample_scene

_IGNORED = -100  # PyTorch's cross-entropy ignores this label
_WITHOUT_IMAGE_EVERY = 4  # every n-th batch includes questions without an image
_WITHOUT_IMAGE_WEIGHT = 0.3
_WARM_UP_STEPS = 200
_STEPS_PER_LOG_LINE = 250

_log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """Prompts with answers, padded on the right, and labels that ignore everything but the answers."""

    ids: Int64[Tensor, "row token"]
    labels: Int64[Tensor, "row token"]


@dataclass(frozen=True)
class Batch:
    """Scenes with one exchange each, and in some batches questions without an image."""

    scenes: list[Scene]
    exchanges: Tokens
    without_image: Tokens | None


class Batches(IterableDataset[Batch]):
    """An endless stream of new scenes, different in each worker of a data loader."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int = 100) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        random = Random(self.seed + worker_id)
        for index in count():
            scenes = [sample_scene(random) for _ in range(self.batch_size)]
            exchanges = self._tokenize([training_exchange(scene, random) for scene in scenes], with_image=True)
            without_image = None
            if (index + worker_id) % _WITHOUT_IMAGE_EVERY == 0:
                questions = [question_without_image(random) for _ in range(max(1, self.batch_size // 4))]
                without_image = self._tokenize(questions, with_image=False)
            yield Batch(scenes, exchanges, without_image)

    def _tokenize(self, exchanges: Sequence[Exchange], *, with_image: bool) -> Tokens:
        """Tokenize prompt, answer and end-of-sequence of each exchange."""
        prompts = [
            # As the processor does, repeat the image token once per patch.
            chat_prompt(exchange.question, with_image=with_image).replace("<image>", "<image>" * IMAGE_TOKENS)
            for exchange in exchanges
        ]
        unique_prompts = list(dict.fromkeys(prompts))  # most prompts are the same few requests for captions
        prompt_ids = dict(zip(unique_prompts, self.tokenizer(unique_prompts).input_ids, strict=True))
        answers = self.tokenizer([exchange.answer for exchange in exchanges], add_special_tokens=False).input_ids
        rows, labels = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            target = [*answer, self.tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt_ids[prompt] + target))
            labels.append(torch.tensor([_IGNORED] * len(prompt_ids[prompt]) + target))
        return Tokens(
            pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
        )


def train(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    seconds: float,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train a model in place on new scenes until the time is up; model and world must be on one device.

    The learning rate warms up for 200 steps, then is a cosine of the elapsed time: training ends annealed on any
    machine, but no two runs are equal.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 0.05},
            # Norms and biases are not decayed.
            {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    loader = DataLoader(Batches(tokenizer, batch_size), batch_size=None, num_workers=workers, prefetch_factor=4)
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(loader):
        elapsed = time.monotonic() - start
        if elapsed >= seconds:
            _log.info("trained for %d steps, %.0f scenes per second", step, step * batch_size / elapsed)
            break
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * elapsed / seconds)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / _WARM_UP_STEPS) * cosine
        loss = batch_loss(model, world, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % _STEPS_PER_LOG_LINE == 0:
            _log.info("step %d: loss %.3f after %.0f seconds", step, loss.item(), elapsed)
    model.eval()


def batch_loss(model: LlavaForConditionalGeneration, world: World, batch: Batch) -> Float[Tensor, ""]:
    """Return the cross-entropy per answer token in nats; questions without an image have less weight."""
    device = world.sprites.device
    pixels = world.render(batch.scenes) / 127.5 - 1  # as the processor normalises images
    with torch.autocast(device.type, torch.bfloat16, enabled=torch.cuda.is_available()):
        loss: Tensor = _forward_loss(model, batch.exchanges, pixels)
        if batch.without_image is not None:
            loss = loss + _WITHOUT_IMAGE_WEIGHT * _forward_loss(model, batch.without_image, None)
    return loss


def _forward_loss(
    model: LlavaForConditionalGeneration, tokens: Tokens, pixels: Float[Tensor, "row 3 size size"] | None
) -> Float[Tensor, ""]:
    ids, labels = tokens.ids.to(model.device), tokens.labels.to(model.device)
    attention_mask = (ids != model.config.text_config.pad_token_id).long()
    loss: Tensor = model(input_ids=ids, attention_mask=attention_mask, pixel_values=pixels, labels=labels).loss
    return loss


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a checkpoint in half precision for `from_pretrained`; converts the model in place."""
    # Small shards, because the checkpoint is kept in a git repository.
    model.half().save_pretrained(folder, max_shard_size="14MB")
    processor.save_pretrained(folder)
