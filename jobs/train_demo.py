"""Make the demo model: train it on rendered scenes, save it as a checkpoint, and measure what was saved.

python jobs/train_demo.py --out runs/demo-model            # 5.5 minutes on one H100, and its measures
python jobs/train_demo.py --out /tmp/smoke --smoke         # the same path in under two minutes on two cores
"""

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from mmray.demo.architecture import build_model, build_processor, train_tokenizer
from mmray.demo.measures import measure
from mmray.demo.scenes import World
from mmray.demo.training import save, train


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; what it holds is overwritten.")],
    seconds: Annotated[float, typer.Option(help="Training time, in seconds.")] = 330.0,
    batch_size: Annotated[int, typer.Option(help="Scenes a step.")] = 768,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    smoke: Annotated[
        bool, typer.Option(help="Only see that it works: at most 20 seconds of 16 scenes a step, and 24 to measure.")
    ] = False,
) -> None:
    """Train the demo model, save it, and print its measures."""
    out.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if smoke:
        seconds, batch_size = min(seconds, 20.0), min(batch_size, 16)

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


if __name__ == "__main__":
    typer.run(main)
