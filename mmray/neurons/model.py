"""The model for users: loaded, checked, with scores and heat maps of its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from PIL.Image import fromarray as from_array
from torch import Tensor

from mmray.data.images import decode_image, read_image, to_rgb
from mmray.data.samples import BACKGROUND
from mmray.errors import InputError
from mmray.models.generation import caption_of, generate
from mmray.models.interventions import by_layer
from mmray.models.loading import LoadedModel, load
from mmray.models.options import LONGEST
from mmray.models.patches import patches_of
from mmray.models.prompting import encode, prefix_before, prompt_text, tokenize_caption
from mmray.neurons.concepts import find_forms
from mmray.neurons.heatmaps import STRENGTH, Map, MapRequest, patch_maps, placed
from mmray.neurons.scores import SCORES, Pieces
from mmray.neurons.scoring import score_batch, whole_nouns
from mmray.neurons.token_positions import locate_mentions
from mmray.neurons.validation import assert_sound

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AnyImage = Image | Path | str | bytes | np.ndarray
"""An image, its path, its encoded bytes, or an array of bytes of shape (height, width) or (height, width, channel)."""


class NeuronModel(LoadedModel):
    """A vision-language model with its processor and parts."""

    def __repr__(self) -> str:
        """Return the model's name, family and size."""
        neurons, layers = sum(self.widths), len(self.widths)
        family, where = self.network.config.model_type, f"{self.network.dtype}, {self.device}"
        return f"{type(self).__name__} {self.name} ({family}, {layers} layers, {neurons:,} neurons, {where})"

    def caption(
        self,
        image: AnyImage,
        *,
        prompt: str | None = None,
        language: str | None = None,
        longest: int = LONGEST,
    ) -> str:
        """Return the model's greedy caption of an image, of at most `longest` tokens, or its answer to a `prompt`.

        Ablation and edits hold here. Raises InputError if the image can't be read.
        """
        return self.generate([image], prompt, language=language, longest=longest)[0]

    def generate(
        self,
        images: Sequence[AnyImage | None],
        prompt: str | None = None,
        *,
        language: str | None = None,
        longest: int = LONGEST,
    ) -> list[str]:
        """Return what the model writes greedily about each image, in one batch; None stands for no image.

        Either all or none may be None. Ablation and edits hold here. Raises InputError if an image can't be read.
        """
        if not images:
            return []
        opened = [open_image(image) for image in images]
        text = prompt_text(self, prompt, language, image=opened[0] is not None)
        return [caption_of(self, tokens)[0] for tokens in generate(self, [text] * len(opened), opened, longest)]

    def contributions(
        self,
        image: AnyImage | None,
        caption: str,
        concept: str,
        *,
        score: str = "contribution",
        fold_norm: bool = False,
        prompt: str | None = None,
        prefix: str | None = None,
        language: str | None = None,
        pieces: Pieces = "first",
    ) -> Float[Tensor, "layer neuron"]:
        """Return every neuron's score for a noun of the caption, on the CPU; contributions are in logits.

        The score is the mean over the noun's occurrences. A noun of several tokens is scored by its first, or by the
        sum of all with `pieces="sum"`. Narrower layers are padded with zeros. Raises InputError if the caption does
        not name the concept, or for an unknown score.
        """
        if score not in SCORES:
            raise InputError(f"unknown score {score!r}; choose from {', '.join(SCORES)}")
        mentions = find_forms(caption, frozenset({concept.casefold()}), language)
        if not mentions:
            raise InputError(f"the caption {caption!r} does not name {concept!r}")
        text = prompt_text(self, prompt, language, image=image is not None, prefix=prefix_before(caption, prefix))
        tokens, offsets = tokenize_caption(self, text, caption)
        batch = encode(self, [text], [open_image(image)], [tokens], [offsets])
        positions = locate_mentions(batch, 0, "", mentions, every=pieces == "sum")
        # A no-op unless all pieces of the noun were scored.
        _, scored = whole_nouns(positions, score_batch(self, batch, positions, score, folded=fold_norm))
        result = torch.zeros(len(self.widths), max(self.widths))
        for layer, scores in enumerate(scored.scores):
            result[layer, : self.widths[layer]] = scores.mean(dim=0).cpu()
        return result

    def heat_map(
        self,
        image: AnyImage,
        neurons: str | Sequence[str],
        *,
        signs: Sequence[float] | None = None,
        prompt: str | None = None,
    ) -> Float[Tensor, "height width"]:
        """Return these neurons' mean activation over an image, at the image's size.

        `signs` of -1 flip neurons that write by negative activation (the sign of `activation` in a ranking). Pixels
        that the processor crops get the map's lowest value. For masks and overlays see `mmray.neurons.heatmaps`.
        Raises InputError if the family's image is not a grid of tokens.
        """
        opened = open_image(image)
        assert opened is not None
        values, covers = self.patch_map(opened, neurons, signs=signs, prompt=prompt)
        return placed(values, covers, opened.height, opened.width)

    def patch_map(
        self,
        image: AnyImage,
        neurons: str | Sequence[str],
        *,
        signs: Sequence[float] | None = None,
        prompt: str | None = None,
    ) -> tuple[Map, tuple[float, float, float, float]]:
        """Return the same by patch, and the part (x, y, width, height) of the image that the patches cover, in 0..1."""
        opened = open_image(image)
        assert opened is not None
        neurons = [neurons] if isinstance(neurons, str) else neurons
        batch = encode(self, [prompt_text(self, prompt, None)], [opened], [[]], [[]])
        patches = patches_of(self, batch, 0, opened.size)
        if patches is None:
            raise InputError(f"{self.name}: its image is no grid of tokens in the sequence, so there are no heat maps")
        by_layer(self, neurons)  # Raises for neurons that the model does not have.
        (values,) = patch_maps(
            self, batch, [MapRequest(0, patches, [self.names.parse(name) for name in neurons], signs)]
        )
        return values, patches.covers

    def plot_heat_map(
        self, image: AnyImage, neurons: str | Sequence[str], *, signs: Sequence[float] | None = None
    ) -> Figure:
        """Return the heat map over its image as a plotly figure, with a colour bar; arguments as `heat_map`."""
        from plotly.graph_objects import Figure, Heatmap

        opened = open_image(image)
        assert opened is not None
        values = self.heat_map(opened, neurons, signs=signs).numpy()
        heat = Heatmap(z=values, opacity=STRENGTH, colorscale="Inferno", colorbar={"title": "mean activation"})
        figure = Figure(heat)
        figure.add_layout_image(
            source=opened, xref="x", yref="y", x=0, y=0, sizex=opened.width, sizey=opened.height, layer="below"
        )
        # Row 0 is at the top, and pixels are square.
        figure.update_yaxes(range=[opened.height, 0], scaleanchor="x", visible=False)
        figure.update_xaxes(range=[0, opened.width], visible=False)
        return figure


Kind = TypeVar("Kind", bound=NeuronModel)


def open_image(image: AnyImage | None, background: str = BACKGROUND) -> Image | None:
    """Return an image in RGB; transparent pixels show `background`.

    Raises InputError with the reason if it can't be read.
    """
    if image is None:
        return None
    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise ValueError(f"an array of {image.dtype}; give uint8")
            image = from_array(image)
        if isinstance(image, Image):
            return to_rgb(image, background)
        return decode_image(image, background) if isinstance(image, bytes) else read_image(image, background)
    except (ValueError, TypeError) as error:
        what = image if isinstance(image, Path | str) else "image"
        raise InputError(f"{what}: not an image that can be read ({error})") from error


def load_model(
    name: str, dtype: str = "auto", device: str | torch.device | None = None, *, trust_remote_code: bool = False
) -> NeuronModel:
    """Load a checkpoint folder, a hub id or `demo` for inference, and validate its parts.

    Arguments are those of `mmray.models.loading.load`. Raises InputError if it can't be loaded or a check fails.
    """
    return load_checked(NeuronModel, name, dtype, device, trust_remote_code=trust_remote_code)


def load_checked(
    kind: type[Kind],
    name: str,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    *,
    trust_remote_code: bool = False,
) -> Kind:
    """Load a model as an instance of `kind`, and validate its parts; see `load_model`."""
    model = load(name, dtype, device, trust_remote_code=trust_remote_code, wrap=kind)
    assert isinstance(model, kind)
    assert_sound(model)
    return model
