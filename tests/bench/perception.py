"""Methods of saliency side by side on fresh scenes of two objects, and the seconds that all boxes take.

python -m tests.bench.perception                        # the demo: 60 scenes, 120 words
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
from mmray.features.saliency.questions import look_at
from mmray.features.saliency.summary import summarise_saliency
from mmray.features.saliency.tables import PARTS
from mmray.models.norms import token_logits
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import find_forms
from mmray.neurons.token_positions import places_of

SEED = 880_000
BATCH = 10


def two_objects(world, count):
    return [scene for scene in world.sample(6 * count, SEED) if len(scene.objects) == 2][:count]


def looked_at(joint, world, scenes):
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
    places = places_of(batch, named)
    boxes = [[scenes[place.row].boxes[scenes[place.row].objects.index(place.concept)]] for place in places]
    return Explained(look_at(model, joint, batch, places, images), [place.concept for place in places]), boxes


def seconds(joint, world, scene, method):
    """Median CPU seconds of one forward and backward of the joint model, and of the alignment of all boxes with it."""
    plain, whole = [], []
    for _ in range(7):
        looked, _ = looked_at(joint, world, [scene])
        look = looked.look
        start = time.process_time()
        leaf = joint.tower(look.pixels).detach().requires_grad_()
        logit = look._at_places(leaf, look.places[:1], token_logits).sum()
        (logit + joint.detect(leaf, looked.words[:1]).logits.max()).backward()
        plain.append(time.process_time() - start)
        looked, _ = looked_at(joint, world, [scene])
        looked.look.places = looked.look.places[:1]
        start = time.process_time()
        METHODS[method](looked, 0)
        whole.append(time.process_time() - start)
    return median(plain), median(whole)


def main(
    model: Annotated[str, typer.Option()] = "demo",
    detector: Annotated[str, typer.Option()] = "demo",
    scenes: Annotated[int, typer.Option()] = 60,
    methods: Annotated[str, typer.Option()] = ",".join(METHODS),
    erased: Annotated[bool, typer.Option(help="Insertion and deletion too.")] = True,
) -> None:
    joint, world = load_joint(model, detector), World.load()
    chosen, rows = two_objects(world, scenes), []
    for start in range(0, len(chosen), BATCH):
        looked, boxes = looked_at(joint, world, chosen[start : start + BATCH])
        for row in observations(looked, draw_maps(looked, methods.split(",")), boxes, erased=erased):
            rows.append(row | {"sample_id": f"{start}-{row['sample_id']}"})
    table = summarise_saliency(pa.Table.from_pylist(rows, schema=PARTS["observations"]))
    for row in table.to_pylist():
        print(
            f"{row['measure']:<18}{row['method']:<18}{row['value']:>7.3f}  "
            f"({row['low']:.3f} – {row['high']:.3f})  {row['words']}"
        )
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
