"""Methods of saliency side by side on fresh scenes of two objects, and the seconds that all boxes take.

python -m tests.bench.perception                        # the demo: 60 scenes, 120 words; --write: into the README
python -m tests.bench.perception --model CHECKPOINT --detector HEADS
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated

import pyarrow as pa
import torch
import typer
from PIL import Image

from jobs.demo.heads import measure_heads
from jobs.demo.scenes import World
from mmray.detector.heads import Heads
from mmray.detector.joint import load_joint
from mmray.features.saliency.methods import METHODS, Explained
from mmray.features.saliency.observations import draw_maps, observations
from mmray.features.saliency.saliency_input import open_input
from mmray.features.saliency.summary import summarise_saliency
from mmray.features.saliency.tables import PARTS
from mmray.models.norms import token_logits
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import find_forms
from mmray.neurons.token_positions import positions_of
from tests.bench import writing

SEED = 880_000
README, COMMAND = "mmray/features/saliency/README.md", "python -m tests.bench.perception --write"
SHOWN = {
    "pointing_game": "peak on the object",
    "iou": "IoU of mask and box",
    "max_box_accuracy": "MaxBoxAcc",
    "deletion": "deletion",
    "insertion": "insertion",
}
"""Measure → its column in the README."""
REMARKS = {"random": " (the detector's boxes)"}
BATCH = 10


def two_objects(world, count):
    return [scene for scene in world.sample(6 * count, SEED) if len(scene.objects) == 2][:count]


def explained_batch(joint, world, scenes):
    """A batch of scenes, each with a caption that names both objects."""
    model = joint.model
    images = [Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()) for pixels in world.render(scenes)]
    captions = [f"An image of a {scene.objects[0]} and a {scene.objects[1]}." for scene in scenes]
    before = prompt_text(model, None, "en")
    tokenized = [tokenize_caption(model, before, caption) for caption in captions]
    batch = encode(model, [before] * len(scenes), images, *map(list, zip(*tokenized, strict=True)))
    named = [
        (str(number), find_forms(caption, frozenset(scene.objects), "en"))
        for number, (scene, caption) in enumerate(zip(scenes, captions, strict=True))
    ]
    places = positions_of(batch, named)
    boxes = [[scenes[place.row].boxes[scenes[place.row].objects.index(place.concept)]] for place in places]
    return Explained(open_input(model, joint, batch, places, images), [place.concept for place in places]), boxes


def seconds(joint, world, scene, method):
    """Median CPU seconds of one forward and backward of the joint model, and of the alignment of all boxes with it."""
    plain, whole = [], []
    for _ in range(7):
        explained, _ = explained_batch(joint, world, [scene])
        given = explained.input
        start = time.process_time()
        leaf = joint.tower(given.pixels).detach().requires_grad_()
        logit = given.at_targets(leaf, given.targets[:1], token_logits).sum()
        (logit + joint.detect(leaf, explained.words[:1]).logits.max()).backward()
        plain.append(time.process_time() - start)
        explained, _ = explained_batch(joint, world, [scene])
        explained.input.targets = explained.input.targets[:1]
        start = time.process_time()
        METHODS[method](explained, 0)
        whole.append(time.process_time() - start)
    return median(plain), median(whole)


def readme_table(measures):
    """Return the README's table: a row per method, those that point best first."""
    found = {(row["method"], row["measure"]): row for row in measures.to_pylist()}
    methods = sorted({method for method, _ in found}, key=lambda name: -found[name, "pointing_game"]["value"])
    methods.sort(key=lambda name: name == "chance")

    def cell(method, measure):
        if (row := found.get((method, measure))) is None:
            return "–"
        return f"{row['value']:.2f} ({row['low']:.2f} – {row['high']:.2f})"

    names = {name: f"`{name}`{REMARKS.get(name, '')}" for name in methods} | {"chance": "a random point"}
    rows = [[names[method], *(cell(method, measure) for measure in SHOWN)] for method in methods]
    return writing.markdown(["method", *SHOWN.values()], rows)


def main(
    model: Annotated[str, typer.Option()] = "demo",
    detector: Annotated[str, typer.Option()] = "demo",
    scenes: Annotated[int, typer.Option()] = 60,
    methods: Annotated[str, typer.Option()] = ",".join(METHODS),
    erased: Annotated[bool, typer.Option(help="Insertion and deletion too.")] = True,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the README.")] = False,
) -> None:
    joint, world = load_joint(model, detector), World.load()
    chosen, rows = two_objects(world, scenes), []
    for start in range(0, len(chosen), BATCH):
        explained, boxes = explained_batch(joint, world, chosen[start : start + BATCH])
        for row in observations(explained, draw_maps(explained, methods.split(",")), boxes, erased=erased):
            rows.append(row | {"sample_id": f"{start}-{row['sample_id']}"})
    table = summarise_saliency(pa.Table.from_pylist(rows, schema=PARTS["observations"]))
    for row in table.to_pylist():
        print(
            f"{row['measure']:<18}{row['method']:<18}{row['value']:>7.3f}  "
            f"({row['low']:.3f} – {row['high']:.3f})  {row['words']}"
        )
    if write:
        writing.write(README, COMMAND, readme_table(table))
    for method in ("alignment", "alignment-boxes", "alignment-any"):
        plain, whole = seconds(joint, world, chosen[0], method)
        print(
            f"{method}, all boxes {whole:.3f} s, one forward and backward {plain:.3f} s, ratio {whole / plain:.2f}, "
            f"{torch.get_num_threads()} threads"
        )
    if isinstance(joint.detector, Heads):
        print(measure_heads(joint.detector, joint.tower))


if __name__ == "__main__":
    typer.run(main)
