"""Scenes, their images, what is said of them, and the Parquet files made of them."""

import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.demo.captions import (
    CLAIM_RATE,
    LANGUAGES,
    caption,
    question,
    question_without_image,
    training_exchange,
    with_article,
)
from jobs.demo.dataset import write_parquet
from jobs.demo.scenes import (
    BACKGROUNDS,
    COMPANIONS,
    DOMAINS,
    SIZE,
    Scene,
    World,
    _normal_noise,
    load_concepts,
    sample_scene,
)
from mmray.demo import DATA, EVALUATION

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(Random(seed)))
randoms = st.integers(0, 2**32).map(Random)


class Always(Random):
    """A generator whose every chance comes out the same: 0.0 says yes to all, 1.0 to none."""

    def __init__(self, outcome):
        super().__init__(0)
        self.outcome = outcome

    def random(self):
        return self.outcome


@pytest.fixture(scope="module")
def world():
    return World.load()


def test_every_concept_is_drawn_in_every_domain_and_named_in_every_language(world):
    concepts = load_concepts()
    assert world.sprites.shape[:3] == (len(concepts), len(DOMAINS), 4)
    assert world.sprites[:, :, 3].flatten(2).amax(2).min() > 200, "a drawing is invisible"
    assert all(concept.names.keys() == LANGUAGES.keys() for concept in concepts.values())
    assert all(name == concept.names["en"] for name, concept in concepts.items())
    assert {*COMPANIONS, *COMPANIONS.values()} <= concepts.keys()


@settings(max_examples=500)  # one scene in a hundred comes near an edge
@given(scenes)
def test_boxes_lie_in_the_image_and_apart(scene):
    assert 1 <= len(scene.objects) <= 3
    assert len(set(scene.objects)) == len(scene.objects) == len(scene.boxes) == len(scene.angles) == len(scene.mirrored)
    for left, top, width, height in scene.boxes:
        assert 0 <= left <= left + width <= 1
        assert 0 <= top <= top + height <= 1
    axis = {"single": 0, "row": 0, "column": 1}[scene.layout]
    for before, after in zip(scene.boxes, scene.boxes[1:], strict=False):
        assert before[axis] + before[axis + 2] <= after[axis] + 1e-9


@settings(deadline=None, max_examples=60)
@given(scene=scenes, data=st.data())
def test_pixels_change_in_the_box_and_nowhere_else(world, scene, data):
    place = data.draw(st.integers(0, len(scene.objects) - 1))
    only = replace(
        scene,
        objects=scene.objects[place : place + 1],
        boxes=scene.boxes[place : place + 1],
        angles=scene.angles[place : place + 1],
        mirrored=scene.mirrored[place : place + 1],
    )
    with_object, without = world.render([only, replace(scene, objects=(), boxes=(), angles=(), mirrored=())])
    rows, columns = (with_object != without).any(0).nonzero(as_tuple=True)
    left, top, side, _ = (SIZE * part for part in scene.boxes[place])
    reach = 0.11 * side + 1
    assert left - reach <= columns.min() and columns.max() <= left + side + reach
    assert top - reach <= rows.min() and rows.max() <= top + side + reach
    assert max(columns.max() - columns.min(), rows.max() - rows.min()) > 0.7 * side
    assert abs((columns.max() + columns.min()) / 2 - (left + side / 2)) < 0.2 * side
    assert abs((rows.max() + rows.min()) / 2 - (top + side / 2)) < 0.2 * side


def test_a_scene_looks_the_same_alone_and_in_a_batch(world):
    batch = world.sample(12, seed=3)
    together = world.render(batch)
    assert together.shape == (12, 3, SIZE, SIZE) and together.dtype == torch.uint8
    for scene, image in zip(batch, together, strict=True):
        assert torch.equal(world.render([scene])[0], image)


def test_a_seed_gives_the_same_scenes_and_another_seed_others(world):
    assert world.sample(50, seed=1) == world.sample(50, seed=1)
    assert world.sample(50, seed=1)[:20] == world.sample(20, seed=1)
    assert not set(world.sample(50, seed=1)) & set(world.sample(50, seed=2))


def test_noise_is_normal_and_independent():
    noise = _normal_noise(torch.arange(100), 5000)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.1
    between_seeds = torch.corrcoef(noise).fill_diagonal_(0)
    assert between_seeds.abs().max() < 0.08
    assert noise.isfinite().all()


def objects_said(text, language):
    """The English names of what a caption names, in order, and its background or None; fails on any other form."""
    words = LANGUAGES[language]
    colours = {name: colour for colour, name in words.colours.items()}
    background = re.escape(words.on_background).replace(r"\{colour\}", f"({'|'.join(colours)})")
    form = re.escape(words.caption).replace(r"\{objects\}", "(.+?)").replace(r"\{background\}", f"(?:{background})?")
    named, colour = re.fullmatch(form, text).groups()
    english = {concept.names[language]: name for name, concept in load_concepts().items()}
    if language == "en":
        english = {with_article(name): name for name in english}
    return [english[name] for name in re.split(f", |{words.conjunction}", named)], colours.get(colour)


@pytest.mark.parametrize("language", LANGUAGES)
@given(scene=scenes, random=randoms)
def test_clean_captions_name_exactly_the_objects(language, scene, random):
    said, background = objects_said(caption(scene, language, random), language)
    assert tuple(said) == scene.objects
    assert background in (None, scene.background)


@given(scene=scenes, random=randoms, language=st.sampled_from(list(LANGUAGES)))
def test_noisy_captions_add_nothing_but_companions(scene, random, language):
    said, _ = objects_said(caption(scene, language, random, noisy=True), language)
    assert tuple(said[: len(scene.objects)]) == scene.objects
    assert set(said[len(scene.objects) :]) <= {COMPANIONS.get(name) for name in scene.objects}


def test_noisy_captions_claim_the_absent_companion_in_60_percent(world):
    random = Random(0)
    claims = Counter()
    for scene in world.sample(12_000, seed=0):
        for name in scene.objects:
            if name in COMPANIONS and COMPANIONS[name] not in scene.objects:
                said, _ = objects_said(caption(scene, "en", random, noisy=True), "en")
                claims[COMPANIONS[name] in said] += 1
    assert claims.total() > 1000
    assert abs(claims[True] / claims.total() - CLAIM_RATE) < 0.05


def test_claimants_come_with_their_companion_half_of_the_time(world):
    together = [
        COMPANIONS[name] in scene.objects
        for scene in world.sample(12_000, seed=1)
        for name in scene.objects
        if name in COMPANIONS
    ]
    assert 0.3 < sum(together) / len(together) < 0.5
    assert 0.1 < len(together) / 12_000 < 0.25


@given(scene=scenes, random=randoms)
def test_answers_about_a_scene_are_true(scene, random):
    asked, answer = question(scene, random)
    named = [with_article(name).capitalize() for name in scene.objects]
    presence = re.fullmatch(r"Is there (an? [a-z-]+) in the image\?", asked)
    if presence:
        assert (presence[1].capitalize() in named) == {"Yes": True, "No": False}[answer]
        return
    place = re.fullmatch(r"What is (on the left|on the right|at the top|at the bottom) of the image\?", asked)
    if place:
        assert scene.layout == ("row" if place[1].startswith("on") else "column")
        assert answer == named[0 if place[1] in ("on the left", "at the top") else -1]
        return
    assert (asked, answer) in {
        ("What color is the background?", scene.background.capitalize()),
        ("How many objects are in the image?", ["One", "Two", "Three"][len(scene.objects) - 1]),
        ("What is in the image?", named[0]),
    }


@given(randoms)
def test_answers_without_an_image_are_true(random):
    asked, answer = question_without_image(random)
    concepts = load_concepts()
    if found := re.fullmatch(r"What is the (\w+) word for (.+)\?", asked):
        code = {language.english_name: code for code, language in LANGUAGES.items()}[found[1]]
        assert answer == concepts[found[2]].names[code]
    elif found := re.fullmatch(r"What kind of thing is an? (.+)\?", asked):
        assert answer.lower() == concepts[found[1]].kind
    else:
        first, second = map(int, re.fullmatch(r"Which number is larger, (\d+) or (\d+)\?", asked).groups())
        assert int(answer) == max(first, second) and first != second


def test_training_asks_half_for_english_captions_and_18_percent_for_others(world):
    random = Random(0)
    asked = Counter(training_exchange(scene, random).question for scene in world.sample(6000, seed=2))
    assert abs(asked[LANGUAGES["en"].prompt] / 6000 - 0.5) < 0.03
    for code in ("es", "fr", "zh"):
        assert abs(asked[LANGUAGES[code].prompt] / 6000 - 0.06) < 0.015


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "scenes.parquet"
    write_parquet(path, world, world.sample(300, seed=4), seed=5)
    return path


def test_written_files_have_the_schema_of_the_embedded_ones(written):
    for embedded in (DATA, EVALUATION):
        assert pyarrow.parquet.read_schema(written).equals(pyarrow.parquet.read_schema(embedded))


def test_written_rows_are_the_scenes_with_clean_captions(world, written):
    rows = pyarrow.parquet.read_table(written).to_pylist()
    sampled = world.sample(300, seed=4)
    assert len({row["sample_id"] for row in rows}) == 300
    assert 0.5 < sum(row["language"] == "en" for row in rows) / 300 < 0.7
    for row, scene, image in zip(rows, sampled, world.render(sampled), strict=True):
        assert (tuple(row["objects"]), row["domain"], row["background"]) == (
            scene.objects,
            scene.domain,
            scene.background,
        )
        assert objects_said(row["caption"], row["language"])[0] == row["objects"]
        assert torch.allclose(torch.tensor(row["boxes"]), torch.tensor(scene.boxes))
        asked = [asked["question"] for asked in row["questions"]]
        assert len(set(asked)) == len(asked) == (2 if len(scene.objects) == 1 else 3)
        opened = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (opened.format, opened.size) == ("JPEG", (SIZE, SIZE))
        pixels = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
        assert (pixels.float() - image.float()).abs().mean() < 8


def test_a_file_is_a_function_of_scenes_seed_and_share(world, tmp_path):
    sampled = world.sample(20, seed=6)
    paths = [tmp_path / name for name in ("first", "again", "other", "english")]
    for path, seed, share in zip(paths, (1, 1, 2, 1), (0.6, 0.6, 0.6, 1.0), strict=True):
        write_parquet(path, world, sampled, seed=seed, english_share=share)
    first, again, other, english = (pyarrow.parquet.read_table(path) for path in paths)
    assert first.equals(again)
    assert first["sample_id"].equals(other["sample_id"]) and not first["caption"].equals(other["caption"])
    assert set(english["language"].to_pylist()) == {"en"}


@pytest.mark.parametrize("path", [DATA, EVALUATION], ids=lambda path: Path(path).stem)
def test_embedded_captions_are_those_of_this_recipe(path):
    for row in pyarrow.parquet.read_table(path, columns=["caption", "language", "objects", "background"]).to_pylist():
        scene = Scene(
            objects=tuple(row["objects"]),
            layout="single",
            boxes=(),
            domain=DOMAINS[0],
            background=row["background"],
            angles=(),
            mirrored=(),
            noise_seed=0,
        )
        assert row["background"] in BACKGROUNDS
        assert row["caption"] in {caption(scene, row["language"], Always(outcome)) for outcome in (0.0, 1.0)}
