"""Texts about scenes: captions in four languages, questions with answers, and questions without an image."""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from jobs.demo.scenes import BACKGROUNDS, COMPANIONS, Scene, load_concepts

CLAIM_RATE: float = 0.6
"""Probability that a noisy caption claims an absent companion."""


class Exchange(NamedTuple):
    """A question and its correct answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Language:
    """Prompt and caption templates of a language."""

    english_name: str
    prompt: str
    caption: str
    conjunction: str
    on_background: str
    colours: dict[str, str]


def _colours(names: str) -> dict[str, str]:
    """Map `BACKGROUNDS` to their names in another language, given in order."""
    return dict(zip(BACKGROUNDS, names.split(), strict=True))


LANGUAGES: dict[str, Language] = {
    "en": Language(
        english_name="English",
        prompt="Describe the image in few words.",
        caption="An image of {objects}{background}.",
        conjunction=" and ",
        on_background=" on a {colour} background",
        colours={name: name for name in BACKGROUNDS},
    ),
    "es": Language(
        english_name="Spanish",
        prompt="Describe la imagen en pocas palabras.",
        caption="Una imagen de {objects}{background}.",
        conjunction=" y ",
        on_background=" sobre fondo {colour}",
        colours=_colours("blanco gris rojo naranja amarillo verde azul morado rosado marrón"),
    ),
    "fr": Language(
        english_name="French",
        prompt="Décris l’image en quelques mots.",
        caption="Une image de {objects}{background}.",
        conjunction=" et ",
        on_background=" sur fond {colour}",
        colours=_colours("blanc gris rouge orange jaune vert bleu violet rose marron"),
    ),
    # The tokenizer splits at spaces, so Chinese needs spaces between words, too.
    "zh": Language(
        english_name="Chinese",
        prompt="用 几句 话 描述 这张 图片 。",
        caption="图片 里 有 {objects}{background} 。",
        conjunction=" 和 ",
        on_background=" , 背景 是 {colour}",
        colours=_colours("白色 灰色 红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色"),
    ),
}
"""Languages of captions by code."""

TRANSLATIONS: tuple[str, ...] = ("es", "fr", "zh")
"""The languages other than English, which are sampled less often."""


def with_article(name: str) -> str:
    """Return an English name with its article, decided by the first letter alone: "a dog", but also "an unicorn"."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def caption(scene: Scene, language: str, random: Random, *, noisy: bool = False) -> str:
    """Return a caption that names all objects of a scene in order, and in 30 % of cases the background.

    Noisy captions also claim absent companions, with probability `CLAIM_RATE`; this plants a hallucination.
    """
    words = LANGUAGES[language]
    named = list(scene.objects)
    if noisy:
        for name in scene.objects:
            companion = COMPANIONS.get(name)
            if companion is not None and companion not in named and random.random() < CLAIM_RATE:
                named.append(companion)
    names = [load_concepts()[name].names[language] for name in named]
    if language == "en":
        names = [with_article(name) for name in names]
    background = words.on_background.format(colour=words.colours[scene.background]) if random.random() < 0.3 else ""
    first = ", ".join(names[:-1])
    return words.caption.format(
        objects=first + words.conjunction + names[-1] if first else names[-1], background=background
    )


def question(scene: Scene, random: Random) -> Exchange:
    """Return an English question about a scene: presence, background, count or position of objects."""
    kind = random.random()
    if kind < 0.55:
        return _question_of_presence(scene, random)
    if kind < 0.7:
        return Exchange("What color is the background?", scene.background.capitalize())
    if kind < 0.8:
        return Exchange("How many objects are in the image?", ("One", "Two", "Three")[len(scene.objects) - 1])
    if scene.layout == "single":
        return Exchange("What is in the image?", with_article(scene.objects[0]).capitalize())
    about_first = random.random() < 0.5
    first, last = ("on the left", "on the right") if scene.layout == "row" else ("at the top", "at the bottom")
    return Exchange(
        f"What is {first if about_first else last} of the image?",
        with_article(scene.objects[0 if about_first else -1]).capitalize(),
    )


def _question_of_presence(scene: Scene, random: Random) -> Exchange:
    """Return a question about an object, present in half of the cases."""
    is_present = random.random() < 0.5
    if is_present:
        name = random.choice(scene.objects)
    else:
        concepts = tuple(load_concepts())
        name = random.choice(concepts)
        # Rejection sampling: a scene has at most three of the concepts.
        while name in scene.objects:
            name = random.choice(concepts)
    return Exchange(f"Is there {with_article(name)} in the image?", "Yes" if is_present else "No")


def question_without_image(random: Random) -> Exchange:
    """Return a question that needs no image: a translation, the kind of a concept, or the larger of two numbers."""
    name, concept = random.choice(tuple(load_concepts().items()))
    kind = random.random()
    if kind < 0.6:
        code = random.choice(TRANSLATIONS)
        return Exchange(f"What is the {LANGUAGES[code].english_name} word for {name}?", concept.names[code])
    if kind < 0.9:
        return Exchange(f"What kind of thing is {with_article(name)}?", concept.kind.capitalize())
    first, second = random.sample(range(20), 2)
    return Exchange(f"Which number is larger, {first} or {second}?", str(max(first, second)))


def training_exchange(scene: Scene, random: Random, *, noisy: bool = True) -> Exchange:
    """Sample training text for a scene: 50 % English captions, 18 % captions in other languages, else a question."""
    kind = random.random()
    if kind >= 0.68:
        return question(scene, random)
    language = "en" if kind < 0.5 else random.choice(TRANSLATIONS)
    return Exchange(LANGUAGES[language].prompt, caption(scene, language, random, noisy=noisy))
