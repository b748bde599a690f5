"""The model as users hold it, with its sight: where in an image a word comes from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmray.detector.joint import JointModel, join_if_given
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.methods import METHODS, Explained, method_of
from mmray.features.saliency.questions import ask, look_at
from mmray.models.generation import caption_of, generate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import prompt_text
from mmray.neurons.heatmaps import placed
from mmray.neurons.model import NeuronModel, load_checked, open_image


class Explanation(NamedTuple):
    """What was asked about, and the maps of it by method, over the part of the image that the model sees."""

    caption: str
    probability: float
    """Of the word's first token, where the caption has it."""
    maps: dict[str, Saliency]
    covers: tuple[float, float, float, float]


class Model(NeuronModel):
    """A vision-language model with its processor and parts, and with a detector where it is given one."""

    def saliency(
        self,
        image: Image | Path | str | bytes,
        caption: str,
        word: str,
        *,
        method: str = "alignment",
        detector: str | None = None,
        alignment: str | None = None,
        prompt: str | None = None,
        language: str | None = None,
    ) -> Float[Tensor, "height width"]:
        """Return how much each point of an image speaks for a word of the caption, true or not, at the image's size.

        Values are in the method's own unit (cosines, for the method `alignment`): `min_max` of `mmray.neurons.heatmaps`
        scales them. `detector` is `demo` (the default for the demo model), a folder of heads, or an OWL-ViT or OWLv2
        with the folder of its `alignment`; methods without boxes need none. What the processor cuts off has the lowest
        value. Raises InputError where the caption does not say the word, for a method that there is not, or one that
        weighs the boxes of a detector where there is none.
        """
        picture = open_image(image)
        assert picture is not None
        method_of(method)
        joint = join_if_given(self, detector, alignment)
        found = explain(self, joint, picture, word, caption, methods=(method,), prompt=prompt, language=language)
        return placed(found.maps[method].values.cpu(), found.covers, picture.height, picture.width)


def explain(
    model: LoadedModel,
    joint: JointModel | None,
    image: Image,
    word: str,
    caption: str | None = None,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    prompt: str | None = None,
    language: str | None = None,
) -> Explanation:
    """Return maps of a word of a caption, by default of the model's own; see `NeuronModel.saliency`."""
    said = caption if caption is not None else own_caption(model, image, prompt, language)
    batch, places = ask(model, image, said, word, prompt=prompt, language=language)
    look = look_at(model, joint, batch, places, [image])
    looked = Explained(look, [word])
    maps = {name: method_of(name)(looked, 0) for name in methods}
    return Explanation(said, float(look.probabilities(look.seen, places)[0]), maps, look.grid(0).covers)


@torch.inference_mode()
def own_caption(model: LoadedModel, image: Image, prompt: str | None, language: str | None) -> str:
    """Return the caption that the model writes of an image, greedily."""
    (tokens,) = generate(model, [prompt_text(model, prompt, language)], [image])
    return caption_of(model, tokens)[0]


def load_model(
    name: str, dtype: str = "auto", device: str | torch.device | None = None, *, trust_remote_code: bool = False
) -> Model:
    """Load a checkpoint folder, a hub id or `demo` for inference, and check its parts; see `mmray.models.loading.load`.

    Raises InputError where it can't be loaded, or where its parts are not what they are taken for.
    """
    return load_checked(Model, name, dtype, device, trust_remote_code=trust_remote_code)
