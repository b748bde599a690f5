"""Make the demo model: train it on rendered scenes, save it as a checkpoint, and measure what was saved.

python -m jobs.demo.train --out runs/demo-model            # 5.5 minutes on one H100, and its measures
python -m jobs.demo.train --out /tmp/smoke --smoke         # all steps in under two minutes on two cores
python -m jobs.demo.train --out runs/detector --detector   # heads of a detector on its tower: 30 minutes on one core
python -m jobs.demo.train --out heads --detector --model CHECKPOINT   # heads for another LLaVA
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from jobs.demo.architecture import build_model, build_processor, train_tokenizer
from jobs.demo.heads import measure_heads, train_heads
from jobs.demo.measures import measure
from jobs.demo.scenes import SIZE, World
from jobs.demo.training import save, train
from mmray.detector.heads import FACTS, Heads, load_heads, save_heads
from mmray.detector.vision_tower import OwnTower
from mmray.models.loading import load


def main(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the checkpoint; an existing model is replaced, existing heads are trained further."
        ),
    ],
    seconds: Annotated[
        float | None, typer.Option(help="Training time, in seconds; default 330, for a detector 1800.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Scenes per step; default 768, for a detector 64.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate; default 0.0015, for a detector 0.002.")
    ] = None,
    detector: Annotated[
        bool, typer.Option(help="Instead, train heads of a detector on a frozen model's tower.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="With --detector: checkpoint folder of the model with the tower, or demo.")
    ] = "demo",
    smoke: Annotated[
        bool, typer.Option(help="Quick check: at most 20 seconds with 16 scenes per step, measured on 24.")
    ] = False,
) -> None:
    """Train the demo model, save it, and print its measures."""
    out.mkdir(parents=True, exist_ok=True)  # fail now, not after the training
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = (1800.0, 64, 2e-3) if detector else (330.0, 768, 1.5e-3)
    seconds, batch_size, learning_rate = seconds or defaults[0], batch_size or defaults[1], learning_rate or defaults[2]
    if smoke:
        seconds, batch_size = min(seconds, 20.0), min(batch_size, 16)
    if detector:
        make_detector(model, out, seconds, batch_size, learning_rate, scenes=24 if smoke else 512)
    else:
        make_model(out, seconds, batch_size, learning_rate, device, smoke=smoke)


def make_model(
    out: Path, seconds: float, batch_size: int, learning_rate: float, device: torch.device, *, smoke: bool
) -> None:
    """Train the demo model, save it, and print its measures."""
    tokenizer = train_tokenizer(scene_count=3_000 if smoke else 30_000)
    model = build_model(tokenizer).to(device)
    print(f"{len(tokenizer)} tokens, {model.num_parameters() / 1e6:.1f} million parameters, on {device}")
    train(
        model,
        tokenizer,
        World.load(device),
        seconds=seconds,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    save(model, build_processor(tokenizer), out)

    print(f"{'measure':<24}{'value':>8}{'n':>8}")
    for name, result in measure(out, 24 if smoke else 512, device).items():
        print(f"{name:<24}{result.value:>8.3f}{result.count:>8}")
    print(f"Saved to {out}. Next: mmray check-model {out}")


def make_detector(name: str, out: Path, seconds: float, batch_size: int, learning_rate: float, scenes: int) -> None:
    """Train heads on a model's tower, save them, and print their measures on test scenes."""
    model = load(name)
    tower = OwnTower(model)
    blank = tower.pixels([Image.new("RGB", (SIZE, SIZE))]).to(model.device, model.network.dtype)
    with torch.no_grad():
        width = tower(blank).shape[2]
    heads, earlier = Heads(model, tower.side, width).to(model.device), {"seconds": 0.0, "scenes": 0}
    if (out / FACTS).is_file():  # train existing heads further, on new scenes
        heads, earlier = load_heads(out, model).requires_grad_(True), json.loads((out / FACTS).read_text())
    rendered = train_heads(
        heads, tower, seconds=seconds, batch_size=batch_size, learning_rate=learning_rate, seen=int(earlier["scenes"])
    )
    save_heads(heads, out, model, {"seconds": earlier["seconds"] + seconds, "scenes": rendered})
    measured = asdict(measure_heads(load_heads(out, model), tower, scenes))
    print("\n".join(f"{name:<24}{value:>8.3f}" for name, value in measured.items()))
    print(f"Saved to {out}. Next: mmray saliency --model {name} --detector {out} --image FILE --word WORD")


if __name__ == "__main__":
    typer.run(main)
