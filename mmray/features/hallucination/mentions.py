"""The model's own captions, the objects that they mention, and what each neuron does where a mention begins.

A mention is hallucinated if the image lacks the object, by CHAIR's rules (Rohrbach et al. 2018). Every mention counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.data.samples import Sample
from mmray.features.hallucination.inputs import JointContext
from mmray.models.decodings import GREEDY, Decoding
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_odds_slope, log_probability
from mmray.models.parts import output_rows
from mmray.models.prompting import Batch, encode, prompt_text
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.attribution import project
from mmray.neurons.concepts import Mention
from mmray.neurons.scoring import folded_directions
from mmray.neurons.token_positions import TokenPosition, locate_mentions
from mmray.objects.ground_truth import with_ground_truth
from mmray.objects.lexicon import ObjectLexicon, objects_of

QUANTITIES = {
    "activation": "input of the MLP's output projection",
    "share": "|activation| · ‖w_out‖ as a fraction of the norm of the MLP's output (CETT, H-Neurons 2512.01797)",
    "contribution": "what the neuron adds to the log-odds of the token said, to first order",
}
"""What is measured of each neuron at the position that predicts a mention's first token."""
FIT, TEST = "fit", "test"


def fold_of(image: str, seed: int) -> str:
    """Return whether an image, given its key, is for choosing and fitting (two thirds of the images) or for testing."""
    # By the image alone: all captions of an image are in one fold, and stay there when data is added or cut otherwise.
    return (FIT, FIT, TEST)[hashlib.sha256(f"{seed} {image}".encode()).digest()[0] % 3]


@dataclass(frozen=True)
class WrittenCaption:
    """A caption that the model wrote."""

    sample: Sample
    image: Image
    prompt: str
    tokens: list[int]
    text: str
    offsets: list[tuple[int, int]]
    mentions: list[Mention]
    objects: frozenset[str]
    """In the image."""


@dataclass(frozen=True)
class Mentioned:
    """Captions of one forward, with a row and a position per mention, and what the forward computed there."""

    rows: list[dict[str, Any]]
    cache: ActivationCache


@dataclass(frozen=True, eq=False)
class MentionReader:
    """Lets a model caption images, and reads its neurons where captions mention objects."""

    model: LoadedModel
    context: JointContext
    batch_size: int
    longest: int
    seed: int

    @property
    def lexicon(self) -> ObjectLexicon:
        """Return the objects that are looked for in captions."""
        statistics = self.context.statistics
        return ObjectLexicon(statistics.vocabulary, statistics.translations, self.context.words)

    def known(self, samples: Sequence[Sample], images: Sequence[Image]) -> list[tuple[Sample, Image]]:
        """Return the samples whose objects are known, with these as their objects, and their images."""
        truth, references, lexicon = self.context.ground_truth, self.context.statistics.references, self.lexicon
        annotated = (with_ground_truth(sample, truth, lexicon, references) for sample in samples)
        return [pair for pair in zip(annotated, images, strict=True) if pair[0].objects is not None]

    def captions(
        self,
        pairs: Sequence[tuple[Sample, Image]],
        decoding: Decoding = GREEDY,
        banned: Sequence[Sequence[list[int]]] = (),
    ) -> list[WrittenCaption]:
        """Let the model caption samples; `banned` has per sample the token sequences that it may not write."""
        prompts = [self._prompt(sample) for sample, _ in pairs]
        written: list[list[int]] = []
        for start in range(0, len(pairs), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = [image for _, image in pairs[part]]
            written += generate(self.model, prompts[part], images, self.longest, decoding, banned[part])
        return self.as_written(pairs, written)

    def as_written(self, pairs: Sequence[tuple[Sample, Image]], written: Sequence[list[int]]) -> list[WrittenCaption]:
        """Return captions whose tokens were written before."""
        lexicon, found = self.lexicon, []
        for (sample, image), tokens in zip(pairs, written, strict=True):
            text, offsets = caption_of(self.model, tokens)
            mentions = lexicon.mentions(text, sample.language)
            objects = objects_of(sample) or frozenset()
            found.append(WrittenCaption(sample, image, self._prompt(sample), tokens, text, offsets, mentions, objects))
        return found

    @torch.inference_mode()
    def read(self, captions: Sequence[WrittenCaption]) -> Iterator[Mentioned]:
        """Yield the mentions of captions with the model's neurons where each begins, batch by batch."""
        mentioning = [caption for caption in captions if caption.mentions]
        for start in range(0, len(mentioning), self.batch_size):
            part = mentioning[start : start + self.batch_size]
            columns = zip(*((one.prompt, one.image, one.tokens, one.offsets) for one in part), strict=True)
            prompts, images, tokens, offsets = columns
            batch = encode(self.model, prompts, images, tokens, offsets)
            rows: list[dict[str, Any]] = []
            positions: list[list[TokenPosition]] = []
            for number, caption in enumerate(part):
                for order, mention in enumerate(caption.mentions):
                    own = locate_mentions(batch, number, caption.sample.sample_id, [mention], every=True)
                    if own:
                        positions.append(own)
                        rows.append(self._row(caption, mention, order, own, batch))
            if rows:
                yield Mentioned(rows, self._forward(batch, positions, rows))

    def _prompt(self, sample: Sample) -> str:
        options = self.context.options
        return prompt_text(self.model, options.prompt, sample.language, prefix=options.prefix)

    def _row(
        self, caption: WrittenCaption, mention: Mention, order: int, own: Sequence[TokenPosition], batch: Batch
    ) -> dict[str, Any]:
        sample = caption.sample
        return {
            "sample_id": sample.sample_id,
            "image": sample.image_key,
            "fold": fold_of(sample.image_key, self.seed),
            "word": mention.concept,
            "mention": order,
            "hallucinated": mention.concept not in caption.objects,
            # The first token is predicted one position earlier, so this is its number in the caption.
            "position": own[0].position + 1 - batch.caption_start[own[0].row],
            "length": len(caption.tokens),
            "text": caption.text,
        }

    def _forward(
        self, batch: Batch, positions: Sequence[Sequence[TokenPosition]], rows: Sequence[dict[str, Any]]
    ) -> ActivationCache:
        """Run a batch, add the log-probability of each mention to its row, and return what is at their beginnings."""
        pieces = [piece for own in positions for piece in own]
        with cache_activations(self.model, batch, pieces, gates=False) as cache:
            forward(self.model, batch)
        found = log_probability(self.model, cache.hidden, cache.tokens)
        for row, own in zip(rows, torch.split(found, [len(own) for own in positions]), strict=True):
            row["log_prob"] = float(own.sum())
        # Later pieces of a word are read for its log-probability only.
        return cache.at([number for number, piece in enumerate(pieces) if piece.piece == 0])


@torch.inference_mode()
def quantities(model: LoadedModel, cache: ActivationCache) -> Iterator[dict[str, Float[Tensor, "mention neuron"]]]:
    """Yield, layer by layer, each quantity of QUANTITIES for every mention and neuron, in fp32."""
    # Log-odds and not the logit: a neuron that raises all tokens alike does not make this one likelier.
    slope = log_odds_slope(model, cache.hidden, cache.tokens)
    directions = folded_directions(model, cache, slope / model.parts.logit_scale)
    for layer, (projection, direction) in enumerate(zip(model.projections, directions, strict=True)):
        activation = cache.activations[layer]
        rows = output_rows(model.network, projection).to(activation.device).float()
        # Neither a bias of the projection nor a norm after it is any neuron's own.
        output = project(activation, rows.T).norm(dim=1, keepdim=True)
        yield {
            "activation": activation,
            "share": activation.abs() * rows.norm(dim=1) / output.clamp(min=torch.finfo(torch.float32).tiny),
            "contribution": activation * project(direction.to(activation.device), rows),
        }
