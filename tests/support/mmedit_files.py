"""E-VQA and E-IC files of MMEdit, made of the demo's scenes: drawn anew, so that no census has seen them.

A rephrased image shows the same objects in another style, at other places. Each record's locality is about another
scene.
"""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from torchvision.transforms.functional import to_pil_image

from jobs.demo.captions import LANGUAGES, Exchange, caption, question_without_image, with_article
from jobs.demo.scenes import BACKGROUNDS, DOMAINS, Scene, World, load_concepts
from mmray.objects.prompts import PARAPHRASES

SEED = 20231016


def write_records(folder: Path, count: int) -> tuple[Path, Path]:
    """Write `count` records of E-VQA and of E-IC with their images, and return the two files."""
    world, random = World.load(), Random(SEED)
    scenes = world.sample(2 * count, SEED)
    again = [
        replace(
            scene,
            domain=DOMAINS[(DOMAINS.index(scene.domain) + 1) % len(DOMAINS)],
            noise_seed=scene.noise_seed ^ 1,
            mirrored=tuple(not one for one in scene.mirrored),
            angles=tuple(-angle for angle in scene.angles),
        )
        for scene in scenes
    ]
    (folder / "images").mkdir(parents=True)
    for kind, some in (("scene", scenes), ("again", again)):
        for number, picture in enumerate(world.render(some)):
            to_pil_image(picture).save(folder / f"images/{kind}{number}.png")
    files = folder / "vqa_eval.json", folder / "caption_eval_edit.json"
    for file, make, first in zip(files, (_question, _caption), (0, count), strict=True):
        numbers = range(first, first + count)
        records = [_record(scenes, number, random, make(scenes[number], number, random)) for number in numbers]
        file.write_text(json.dumps(records, indent=1))
    return files


def _record(scenes: list[Scene], number: int, random: Random, edit: dict[str, Any]) -> dict[str, Any]:
    other = (number + len(scenes) // 2) % len(scenes)
    text = question_without_image(random)
    about = _asked(scenes[other], random.randrange(3), random)[0]
    return edit | {
        "image": f"images/scene{number}.png",
        "image_rephrase": f"images/again{number}.png",
        "loc": text.question,
        "loc_ans": text.answer,
        "m_loc": f"images/scene{other}.png",
        "m_loc_q": about.question,
        "m_loc_a": about.answer,
    }


def _asked(scene: Scene, kind: int, random: Random) -> tuple[Exchange, str, str]:
    """Return a question about a scene with its right answer, the question in other words, and a wrong answer."""
    thing = random.choice([name for name in load_concepts() if name not in scene.objects])
    if kind == 0:
        where = {"single": "in", "row": "on the left of", "column": "at the top of"}[scene.layout]
        right = Exchange(f"What is {where} the image?", with_article(scene.objects[0]).capitalize())
        return right, f"Which object is {where} the image?", with_article(thing).capitalize()
    if kind == 1:
        right = Exchange("What color is the background?", scene.background.capitalize())
        wrong = random.choice([name for name in BACKGROUNDS if name != scene.background])
        return right, "Which color is the background?", wrong.capitalize()
    shown = random.choice(scene.objects)
    right = Exchange(f"Is there {with_article(shown)} in the image?", "Yes")
    return right, f"Is there {with_article(shown)} in this image?", "No"


def _question(scene: Scene, number: int, random: Random) -> dict[str, Any]:
    """Return the edit of an E-VQA record, with VLKEB's question that follows from it where there is one."""
    right, rephrase, wrong = _asked(scene, number % 3, random)
    edit = {"src": right.question, "rephrase": rephrase, "pred": right.answer, "alt": wrong}
    if number % 3:
        return edit
    follows = {"Question": f"Is there {wrong[0].lower()}{wrong[1:]} in the image?", "Answer": "Yes"}
    return edit | {"port_new": [{"port_type": "1-hop", "Q&A": follows}]}


def _caption(scene: Scene, number: int, random: Random) -> dict[str, Any]:
    """Return the edit of an E-IC record: one object of the caption is exchanged."""
    others = [name for name in load_concepts() if name not in scene.objects]
    changed = replace(scene, objects=(random.choice(others), *scene.objects[1:]))
    # The same draws for both, so that they agree on whether the background is named.
    pred, alt = (caption(one, "en", Random(number)) for one in (scene, changed))
    # Without the last, which asks for a name instead of a caption.
    wordings = PARAPHRASES["en"][:-1]
    rephrase = wordings[number % len(wordings)]
    return {"src": LANGUAGES["en"].prompt, "rephrase": rephrase, "pred": pred, "alt": alt}
