"""The tables of families and model types in mmray/models/README.md, made from the tiny checkpoints.

`python -m tests.models.support` writes them anew.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmray.features.census.model_check import abilities_of, check_model
from mmray.models.loading import LoadedModel
from mmray.neurons.row_sharing import RowSharing
from tests.support import model_types, text_models
from tests.support.model_types import KINDS
from tests.support.tiny import VARIANTS, build

README = Path(__file__).parents[2] / "mmray/models/README.md"
SECTIONS = {
    name: re.compile(rf"(<!-- {name}: python -m tests\.models\.support -->\n\n).*?(\n<!-- {name} end -->)", re.DOTALL)
    for name in ("families", "texts", "types", "others")
}
"""By the name of the table, its place in the README."""
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


def text_row(family: str, model: LoadedModel) -> str:
    """Return a text-only family's line of the table: its MLPs, and which claims of `check-model` hold."""
    first, checks = model.parts.of("language")[0], check_model(model)
    kind = "experts" if first.experts else "gated" if first.gate else "plain"
    path = re.sub(r"\.\d+\.", ".N.", first.path, count=1)
    held = f"{sum(check.passed for check in checks)} of {len(checks)}"
    found = "probe" if model.parts.family == "probed" else "table"
    return f"| {text_models.NAMES[family]} | `{path}` | {kind} | {found} | {held} |"


def text_table(open_model: Callable[[str], LoadedModel]) -> str:
    """Return the table of the text-only families."""
    head = "| family | output projection of the MLPs | MLP | found by | checks |"
    lines = [head, "|---|---|---|---|---|", *(text_row(name, open_model(name)) for name in text_models.NAMES)]
    return "\n".join(lines) + "\n"


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


SHORT = {
    "heat maps, saliency": "heat maps",
    "captions of an image share a row": "shared rows",
    "edits that are learned": "learned edits",
    "selectivity --steer": "steering",
    "neurons of the vision tower": "vision neurons",
    "neurons of the projector": "projector neurons",
}
"""Abilities by their names in a table."""


def type_row(name: str, model: LoadedModel) -> str:
    """Return the line of a model type that the probe reads."""
    checks, parts = check_model(model), model.parts
    language = parts.of("language")
    kind = "experts" if any(one.experts for one in language) else "gated" if language[0].gate else "plain"
    image = "encoder" if parts.encoder_decoder else parts.image
    path = re.sub(r"\.\d+\.", ".N.", language[-1].path, count=1)
    counts = " | ".join(str(len(parts.of(module))) for module in ("vision", "projector"))
    missing = ", ".join(SHORT.get(one.name, one.name) for one in abilities_of(model) if one.problem) or "–"
    held = f"{sum(check.passed for check in checks)} of {len(checks)}"
    return f"| `{name}` | `{path}` | {kind} | {image} | {counts} | {missing} | {held} |"


def types_table(open_type: Callable[[str], LoadedModel]) -> str:
    """Return the table of the types that the probe reads."""
    head = (
        "| type | output projection of the language MLPs | MLP | image | vision | projector | does not work | checks |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|", *(type_row(name, open_type(name)) for name in KINDS)]
    return "\n".join(lines) + "\n"


NOT_CHECKED = "Not checked, for want of a tiny checkpoint"
OTHERS = {
    "diffusion_gemma": "not causal: it generates by diffusion over blocks",
    "evolla": "reads proteins, not images",
    "fast_vlm": "not checked: its vision tower needs timm",
    "gemma3n": "refused: AltUp; blocks pass on four streams, mixed with weights per token, so a write has no one place",
    "instructblipvideo": "reads videos, not images",
    "mistral4": "a language model without images",
    "nemotron_h_omni": "refused: most of its blocks have no MLP, but state-space layers or attention alone",
    "perception_lm": "not checked: its vision tower needs timm",
    "pi0": "writes actions of a robot, not text",
    "pp_formulanet": "reads formulas without a prompt",
    "shieldgemma2": "Gemma 3 with another head, of two words",
    "udop": "needs the boxes of words on a page",
}
"""Types of transformers without a row in the tables, and why."""


def others_table() -> str:
    """Return a line per model type of transformers that neither table has."""
    known = {facts.config for facts in VARIANTS.values()} | KINDS.keys()
    rest = [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in known]
    lines = ["| type | why not |", "|---|---|", *(f"| `{name}` | {OTHERS[name]} |" for name in rest if name in OTHERS)]
    unchecked = ", ".join(f"`{name}`" for name in rest if name not in OTHERS)
    return "\n".join(lines) + "\n\n" + textwrap.fill(f"{NOT_CHECKED}: {unchecked}.", 126) + "\n"


def written(text: str, made: dict[str, str]) -> str:
    """Return the README with these tables in their places."""
    for name, table in made.items():
        text = SECTIONS[name].sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


def main() -> None:
    from mmray.neurons.model import load_model

    with tempfile.TemporaryDirectory() as folder:
        made = {
            "families": table(lambda variant: load_model(str(build(variant, Path(folder) / variant)))),
            "texts": text_table(lambda name: load_model(str(text_models.build(name, Path(folder) / f"text {name}")))),
            "types": types_table(lambda name: load_model(str(model_types.build(name, Path(folder) / name)))),
            "others": others_table(),
        }
    README.write_text(written(README.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
