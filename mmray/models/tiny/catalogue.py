"""All tiny checkpoints by the name of their type, and what is said of types of transformers that have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmray.models.tiny import checkpoints, kind_checkpoints, texts
from mmray.models.tiny.kinds import KINDS
from mmray.models.tiny.variants import VARIANTS


@dataclass(frozen=True)
class TinyType:
    """A model type, or one of several compositions of it, with its tiny checkpoint."""

    model_type: str
    reads_images: bool
    build: Callable[[Path], Path]
    """Writes the checkpoint into a folder, the same bytes at every call."""
    needs: str = ""
    """A library that transformers runs the type with."""

    @property
    def lacks(self) -> str:
        """The library that is not installed; empty if none is missing."""
        return self.needs if self.needs and find_spec(self.needs) is None else ""


def _variants() -> dict[str, TinyType]:
    counts = Counter(facts.config for facts in VARIANTS.values())
    found = {}
    for variant, facts in VARIANTS.items():
        decoder = f" with {variant.rpartition('_')[2]}" if counts[facts.config] > 1 else ""
        found[f"{facts.config}{decoder}"] = TinyType(facts.config, True, partial(checkpoints.build, variant))
    return found


_TYPES: dict[str, TinyType] = {
    **_variants(),
    **{
        name: TinyType(name.partition(" ")[0], True, partial(kind_checkpoints.build, name), kind.needs)
        for name, kind in KINDS.items()
    },
    **{name: TinyType(name, False, partial(texts.build, name)) for name in (*texts.FAMILIES, *texts.PROBED)},
}
CATALOGUE = dict(sorted(_TYPES.items()))
"""By the names of the support matrix: a type, and what sets this one apart from others of the type."""

WITHOUT = {
    "chameleon": "bars the tokens of images from its logits, so these are no product with the unembedding",
    "diffusion_gemma": "not causal: it generates by diffusion over blocks",
    "evolla": "reads proteins, not images",
    "glm5_next": "refused: hyper-connections; blocks pass on several streams, mixed in another way than Gemma 3n's",
    "hy_v4_vl": "refused: hyper-connections, as in glm5_next",
    "inkling_mm_model": "refused: routed experts of an unknown kind",
    "instructblipvideo": "reads videos, not images",
    "mistral4": "a language model without images",
    "muse_spark": "refused: routed experts of an unknown kind",
    "nemotron_h_omni": "refused: most of its blocks have no MLP, but state-space layers or attention alone",
    "pi0": "writes actions of a robot, not text",
    "pp_formulanet": "reads formulas without a prompt",
    "qwen4_exp": "refused: hyper-connections, as in glm5_next",
    "shieldgemma2": "Gemma 3 with another head, of two words",
    "udop": "needs the boxes of words on a page",
    "unlimited_ocr": "an image that is cut into tiles needs inputs that are no tensors",
}
"""Types of transformers that are not supported, and why."""


def untried() -> tuple[str, ...]:
    """Return the image-text types of this version of transformers that nothing is known about."""
    known = {tiny.model_type for tiny in CATALOGUE.values()} | WITHOUT.keys()
    return tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in known)
