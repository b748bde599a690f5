"""Training-free decoding against hallucination, as data: what each changes about the choice of the next token.

The next token is the likeliest by a combination of logits, l(image) + Σ wᵥ · (l(image) − l(v)), over other views v of
the image. As in VCD and PAI, tokens less likely given the image than PLAUSIBLE times the likeliest are left out.
Attention to the image may be amplified as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmray.errors import InputError

PLAUSIBLE = 0.1
"""β of VCD (equation 4), and of PAI's code."""
NOISE_STEP = 500
"""Of 1000 steps of diffusion, those that VCD's noised image has gone through (its code's default)."""
PAI_GAMMA = 1.1
"""γ of PAI's equation 6 for LLaVA: logits given the image γ times, less those without it γ − 1 times."""
PAI_FIRST = 1 / 16
"""Fraction of the decoder's first layers whose attention PAI leaves alone: 2 of LLaVA's 32."""
NOISED, NO_IMAGE, MIRRORED, SHIFTED = "noised", "no image", "mirrored", "shifted"
"""Views of an image: with diffusion noise; the prompt without the image; mirrored; moved by a part of a patch."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen."""

    name: str
    strength: float
    views: tuple[tuple[str, float], ...] = ()
    """Views of the image and their weights wᵥ; a negative weight averages, a positive one contrasts."""
    attention: float = 0.0
    """α of PAI's equation 3: attention logits a of the last position to image tokens become a + α · |a|."""

    @property
    def plain(self) -> bool:
        """Whether it takes the model's own likeliest token."""
        return not self.attention and not any(weight for _, weight in self.views)

    def __str__(self) -> str:
        return f"{self.name}:{self.strength:g}"


@dataclass(frozen=True)
class DecodingMethod:
    """An entry of DECODINGS."""

    definition: str
    strength: float
    """The default: the published one, where there is one."""
    make: Callable[[float], tuple[tuple[tuple[str, float], ...], float]]
    """Returns views and attention of a `Decoding` for a strength."""


DECODINGS: dict[str, DecodingMethod] = {
    "vcd": DecodingMethod(
        "contrast with the image after 500 of 1000 steps of diffusion noise (Leng et al. 2023); strength α",
        1.0,
        lambda alpha: (((NOISED, alpha),), 0.0),
    ),
    "no-image": DecodingMethod(
        "contrast with the prompt without its image (equation 6 of PAI alone); strength γ − 1",
        1.0,
        lambda weight: (((NO_IMAGE, weight),), 0.0),
    ),
    "pai": DecodingMethod(
        "attention to image tokens amplified, and no-image:0.1 (Liu et al. 2024); strength α",
        0.5,
        lambda alpha: (((NO_IMAGE, PAI_GAMMA - 1),), alpha),
    ),
    "average": DecodingMethod(
        "mean logits of the image, its mirror image and two shifted ones; strength: share of the others",
        0.75,
        lambda weight: (tuple((view, -weight / 3) for view in (MIRRORED, f"{SHIFTED} +", f"{SHIFTED} -")), 0.0),
    ),
}
"""By name."""
GREEDY = Decoding("greedy", 0.0)


def decoding_of(name: str, strength: float | None = None) -> Decoding:
    """Return the decoding that NAME or NAME:STRENGTH stands for.

    Raises InputError for an unknown name, or a strength that is no number of at least 0.
    """
    base, _, given = name.partition(":")
    if base not in DECODINGS:
        raise InputError(f"unknown decoding {base!r}; choose from {', '.join(DECODINGS)}")
    method = DECODINGS[base]
    try:
        value = strength if strength is not None else float(given) if given else method.strength
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"decoding {name!r}: give a strength of at least 0 after the colon, such as {base}:0.5")
    views, attention = method.make(value)
    return Decoding(base, value, views, attention)
