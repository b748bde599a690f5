"""The public model: a loaded model whose words can be traced back to the image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.detector.joint import JointModel, join_if_given
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.methods import METHODS, Explained, method_of
from mmray.features.saliency.saliency_input import open_input, target_of
from mmray.neurons.heatmaps import placed
from mmray.neurons.model import AnyImage, NeuronModel, load_checked, open_image


class Explanation(NamedTuple):
    """A word's maps by method, over the part of the image that the model sees."""

    caption: str
    probability: float
    """Of the word's first token in the caption."""
    maps: dict[str, Saliency]
    covers: tuple[float, float, float, float]


class Model(NeuronModel):
    """A vision-language model with its processor and parts."""

    def saliency(
        self,
        image: AnyImage,
        caption: str,
        word: str,
        *,
        method: str = "alignment",
        detector: str | None = None,
        alignment: str | None = None,
        prompt: str | None = None,
        language: str | None = None,
    ) -> Float[Tensor, "height width"]:
        """Return how much each point of an image supports a word of the caption, at the image's size.

        The caption may be wrong. Values are in the method's own unit (cosines for `alignment`); `min_max` of
        `mmray.neurons.heatmaps` scales them. `detector` is `demo` (the default for the demo model), a folder of heads,
        or an OWL-ViT or OWLv2 with the folder of its `alignment`; methods without boxes need none. Where the processor
        crops the image, the map has its lowest value. Raises InputError where the caption does not have the word, for
        an unknown method, and for one that needs a detector where there is none.
        """
        picture = open_image(image)
        assert picture is not None
        # An unknown method is refused before the detector is loaded.
        method_of(method)
        joint = join_if_given(self, detector, alignment)
        found = explain(self, joint, picture, word, caption, methods=(method,), prompt=prompt, language=language)
        return placed(found.maps[method].values.cpu(), found.covers, picture.height, picture.width)


def explain(
    model: NeuronModel,
    joint: JointModel | None,
    image: Image,
    word: str,
    caption: str | None = None,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    prompt: str | None = None,
    language: str | None = None,
) -> Explanation:
    """Return maps of a word of a caption, by default the model's own; see `Model.saliency`."""
    text = caption if caption is not None else model.caption(image, prompt=prompt, language=language)
    batch, targets = target_of(model, image, text, word, prompt=prompt, language=language)
    given = open_input(model, joint, batch, targets, [image])
    explained = Explained(given, [word])
    maps = {name: method_of(name)(explained, 0) for name in methods}
    return Explanation(text, float(given.probabilities(given.features, targets)[0]), maps, given.grid(0).covers)


def load_model(
    name: str, dtype: str = "auto", device: str | torch.device | None = None, *, trust_remote_code: bool = False
) -> Model:
    """Load a checkpoint folder, a hub id or `demo` for inference, and check its parts; as `mmray.models.loading.load`.

    Raises InputError where it can't be loaded, or where its parts do not behave as expected.
    """
    return load_checked(Model, name, dtype, device, trust_remote_code=trust_remote_code)
