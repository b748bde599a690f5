"""The table of families in mmray/models/README.md, made from the tiny checkpoints.

`python -m tests.models.support` writes it anew.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from mmray.features.census.model_check import check_model
from mmray.models.loading import LoadedModel
from mmray.neurons.row_sharing import RowSharing
from tests.support.tiny import VARIANTS, build

README = Path(__file__).parents[2] / "mmray/models/README.md"
SECTION = re.compile(
    r"(<!-- families: python -m tests\.models\.support -->\n\n).*?(\n<!-- families end -->)", re.DOTALL
)
NAMES = {
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "vipllava": "VipLLaVA",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma 3",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "instructblip_vicuna": "InstructBLIP, Vicuna",
    "instructblip_t5": "InstructBLIP, T5",
    "blip2_opt": "BLIP-2, OPT",
    "blip2_t5": "BLIP-2, T5",
    "mllama": "Mllama",
}
"""Variant → the family as people know it."""


def row(variant: str, model: LoadedModel) -> str:
    """Return a variant's line of the table: the parts found, and which claims of `check-model` hold."""
    parts, checks = model.parts, check_model(model)
    language = parts.of("language")
    kind = "experts" if language[0].experts else "gated" if language[0].gate else "plain"
    image = "encoder" if parts.encoder_decoder else parts.image
    path = re.sub(r"\.\d+\.", ".N.", language[0].path, count=1)
    counts = [
        " · ".join(sorted({".".join(p.path.split(".")[-2:]) for p in parts.of(m)})) or "–"
        for m in ("vision", "projector")
    ]
    held = f"{sum(check.passed for check in checks)} of {len(checks)}"
    shared = "no" if RowSharing(model).problem else "yes"
    return f"| {NAMES[variant]} | `{path}` | {kind} | {image} | {counts[0]} | {counts[1]} | {shared} | {held} |"


def table(open_model: Callable[[str], LoadedModel]) -> str:
    """Return the table of all variants."""
    head = (
        "| family | output projection of the language MLPs | MLP | image | vision MLPs | projector MLPs | shared rows "
        "| checks |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|", *(row(variant, open_model(variant)) for variant in VARIANTS)]
    return "\n".join(lines) + "\n"


def written(text: str, made: str) -> str:
    """Return the README with this table in its place."""
    return SECTION.sub(lambda found: found[1] + made + found[2], text)


def main() -> None:
    from mmray.neurons.model import load_model

    with tempfile.TemporaryDirectory() as folder:
        made = table(lambda variant: load_model(str(build(variant, Path(folder) / variant))))
    README.write_text(written(README.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
