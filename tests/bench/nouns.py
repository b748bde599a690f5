"""Recall and precision of noun taggers, and of the guess of a caption's language.

    python -m tests.bench.nouns [--conllu FILE.conllu]

Texts are COCO's 80 names in ten templates, labelled captions, and the sentences of a treebank of Universal Dependencies
if there is one at hand (UD_English-EWT's test file). `plain` is HanTa's tagger without this package's rules. Languages
are guessed of the English captions and of ten captions in each of ten others.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from mmray.neurons import tagger
from mmray.neurons.concepts import textblob_nouns
from mmray.neurons.language_id import guess_language
from mmray.neurons.tagger import Noun, hanta_nouns

Span = tuple[int, int]
Text = tuple[str, set[Span], set[Span]]
"""A text, the places of its nouns, and places that count neither as right nor as wrong."""

COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
TEMPLATES = (
    "A {}.",
    "A {} on a table.",
    "The {} is next to a man.",
    "A photo of a large red {}",
    "There is a small {} near the window.",
    "A woman is holding her {} outside.",
    "A room with a chair and {}.",
    "{} in the street",
    "a {}",
    "One {}, two plates and a lamp.",
)

CAPTIONS = """
A brown *bear walks through tall *grass near a *river.
An *orange and a *banana sit on a white *plate.
A *man in a blue *shirt is riding a *wave on a *surfboard.
Two *dogs play with a *frisbee in the *park.
A *bathroom with a *toilet, *sink and *mirror.
A *remote and a *cup of *coffee on the ~arm of a *couch.
A *rose.
A *fly on a *leaf
A *wrench lying next to a *hammer
An *ostrich.
A *key.
A *woman cuts a *cake with a long *knife.
A black and white *cat sleeps on the *keyboard of a *laptop.
Several *people are standing around a *table filled with *food.
The *boy swings his *bat at the *ball.
A red *stop *sign at the *corner of two *streets.
A *group of young *children flying *kites on the *beach.
Three *sheep grazing in a green *field under a cloudy *sky.
A *train traveling down the *tracks next to a *building
A *plate of *pasta with *broccoli and sliced *carrots.
A little *girl brushes her *teeth in ~front of a *mirror
a *dog jumps over a *fence
A *bird perched on the *branch of a *tree.
Some *cows that are standing in the *snow.
A *vase with pink *flowers sits by the *window.
A *skier is going down a steep *slope.
A *man talking on his *cell *phone while crossing the *street
The *clock on the *tower says it is *noon.
Old *truck parked in ~front of an abandoned *house.
*People?
A *person wearing a *helmet rides a *bike up a *hill.
A *kitchen with a *stove, a *microwave and a *refrigerator.
An *elephant sprays *water with its *trunk.
Two *giraffes drink from a *pond at *sunset
This *pizza has *cheese, *mushrooms and *olives on it.
A *baseball *player slides into *base as the *umpire watches.
A *child holds a *teddy *bear and a *blanket.
A *cell *phone next to a *mouse on a wooden *desk.
A *bear and its *cub drink from a *stream
The *back of a *bus with an *advertisement on it.
A *man is trying to fly a *kite.
A *woman and her *dog run along the *shore.
A very tall *building with a *clock on its *side.
A young *man does a *trick on his *skateboard at a *skate *park.
A *saw, a *drill and a *nail.
A *swallow sits on a *wire.
A ~close ~up of a *sandwich cut in ~half
A *duck and a *swan swim on the *lake.
A *wave crashes against the *rocks.
A *kiss between a *bride and a *groom.
Someone pours *milk into a *glass
A *surfer about to ride a big *wave
*Boats are docked at the *pier.
A stuffed *animal sitting in a *chair
A *lamp that is on a *nightstand beside the *bed.
A *cat is watching the *TV.
The *cook prepares *fish on the *grill.
A *park with a *bench and a *fountain in the ~middle
He is wearing a *tie and a *suit.
A *spring *roll and a *bowl of *rice.
An *iron on an ~ironing *board.
A *bat hangs from a *branch.
A *model of a *ship in a *bottle.
A gray *seal lies on the *ice.
A *crane lifts a *beam.
A *wok, a *ladle and a *sieve hang on the *wall.
A white *swing hangs from the old *oak.
The red and yellow *balloon is in the *air.
*Bears
"""
"""Nouns have an asterisk before them; words that grammars disagree about have a tilde."""


OTHERS = {
    "es": """
Una orca.
Un perro corre por la playa.
La letra A.
El gato duerme sobre el sofá.
Una mujer con un paraguas rojo.
Dos niños juegan al fútbol en el parque.
Un plato de pasta con brócoli
Los pingüinos son aves que no vuelan.
Hombre montando una ola en una tabla de surf
Un oso pardo.
""",
    "fr": """
Un chien court sur la plage.
Une femme avec un parapluie rouge
Le chat dort sur le canapé.
Deux enfants jouent au football dans le parc.
Une pomme.
Un ours brun
La lettre A.
Un homme surfe sur une vague
Trois bateaux dans le port
Une photo d'un train
""",
    "de": """
Ein Hund läuft am Strand.
Eine Frau mit einem roten Regenschirm
Die Katze schläft auf dem Sofa.
Zwei Kinder spielen Fußball im Park.
Ein Apfel.
Ein Braunbär
Der Buchstabe A.
Ein Mann reitet auf einer Welle
Drei Boote im Hafen
Ein Foto von einem Zug
""",
    "it": """
Un cane corre sulla spiaggia.
Una donna con un ombrello rosso
Il gatto dorme sul divano.
Due bambini giocano a calcio nel parco.
Una mela.
Un orso bruno
La lettera A.
Un uomo cavalca un'onda
Tre barche nel porto
Una foto di un treno
""",
    "pt": """
Um cachorro corre na praia.
Uma mulher com um guarda-chuva vermelho
O gato dorme no sofá.
Duas crianças jogam futebol no parque.
Uma maçã.
Um urso pardo
A letra A.
Um homem surfa uma onda
Três barcos no porto
Uma foto de um trem
""",
    "nl": """
Een hond rent over het strand.
Een vrouw met een rode paraplu
De kat slaapt op de bank.
Twee kinderen spelen voetbal in het park.
Een appel.
Een bruine beer
De letter A.
Een man surft op een golf
Drie boten in de haven
Een foto van een trein
""",
    "pl": """
Pies biegnie po plaży.
Kobieta z czerwonym parasolem
Kot śpi na kanapie.
Dwoje dzieci gra w piłkę nożną w parku.
Jabłko.
Niedźwiedź brunatny
Litera A.
Mężczyzna surfuje na fali
Trzy łodzie w porcie
Zdjęcie pociągu
""",
    "tr": """
Bir köpek sahilde koşuyor.
Kırmızı şemsiyeli bir kadın
Kedi kanepede uyuyor.
İki çocuk parkta futbol oynuyor.
Bir elma.
Bir boz ayı
A harfi.
Bir adam dalgada sörf yapıyor
Limanda üç tekne
Bir tren fotoğrafı
""",
    "sv": """
En hund springer på stranden.
En kvinna med ett rött paraply
Katten sover på soffan.
Två barn spelar fotboll i parken.
Ett äpple.
En brunbjörn
Bokstaven A.
En man surfar på en våg
Tre båtar i hamnen
Ett foto av ett tåg
""",
    "id": """
Seekor anjing berlari di pantai.
Seorang wanita dengan payung merah
Kucing tidur di sofa.
Dua anak bermain sepak bola di taman.
Sebuah apel.
Seekor beruang coklat
Huruf A.
Seorang pria berselancar di ombak
Tiga perahu di pelabuhan
Foto sebuah kereta
""",
}


def labelled() -> Iterator[Text]:
    """Yield the labelled captions."""
    for line in CAPTIONS.strip().splitlines():
        text, spans = "", {"*": set(), "~": set()}
        for mark, word, rest in re.findall(r"([*~]?)([\w-]+)|([^\w*~-]+)", line):
            if mark:
                spans[mark].add((len(text), len(text) + len(word)))
            text += word or rest
        yield text, spans["*"], spans["~"]


def templates() -> Iterator[Text]:
    """Yield each of COCO's names in each template; of a name of two words the last is looked for."""
    for name in re.split(r",\s+", COCO.strip()):
        for template in TEMPLATES:
            text = template.format(name)
            text = re.sub(r"^A(?= [aeiou])", "An", text[:1].upper() + text[1:] if template[0] != "a" else text)
            text = re.sub(r"\ba(?= [aeiou])", "an", text)
            start = text.lower().index(name) + name.rfind(" ") + 1
            here = (start, start + len(name.split()[-1]))
            yield text, {here}, {match.span() for match in re.finditer(r"\w+", text)} - {here}


def treebank(path: Path) -> Iterator[Text]:
    """Yield the sentences of a CoNLL-U file; proper nouns, and parts of words like `e-mail`, count as neither."""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        text = next((line[9:] for line in block.splitlines() if line.startswith("# text = ")), "")
        words = [match.span() for match in re.finditer(r"\w+(?:-\w+)*", text)]
        nouns: set[Span] = set()
        neutral: set[Span] = set()
        place = 0
        for cells in (line.split("\t") for line in block.splitlines()):
            if not cells[0].isdigit() or (start := text.find(cells[1], place)) < 0:
                continue
            place = start + len(cells[1])
            if cells[3] == "PROPN" or (start, place) not in words:
                neutral |= {word for word in words if word[0] <= start < word[1]}
            elif cells[3] == "NOUN":
                nouns.add((start, place))
        yield text, nouns, neutral


def hanta(caption: str) -> list[Noun]:
    return hanta_nouns(caption, "en")


def plain(caption: str) -> list[Noun]:
    with patch.object(tagger, "LANGUAGES", {"en": replace(tagger.LANGUAGES["en"], letters={})}):
        return hanta(caption)


TAGGERS: dict[str, Callable[[str], list[Noun]]] = {"hanta": hanta, "plain": plain, "textblob": textblob_nouns}


def measure(find: Callable[[str], list[Noun]], texts: Sequence[Text]) -> tuple[float, float, float]:
    """Return recall, precision and the seconds of this process's CPU per text."""
    find(texts[0][0])  # loads the model
    began = time.process_time()
    answers = [{(noun.start, noun.stop) for noun in find(text)} for text, _, _ in texts]
    seconds = time.process_time() - began
    right = sum(len(found & nouns) for found, (_, nouns, _) in zip(answers, texts, strict=True))
    wrong = sum(len(found - nouns - neutral) for found, (_, nouns, neutral) in zip(answers, texts, strict=True))
    return right / sum(len(nouns) for _, nouns, _ in texts), right / (right + wrong), seconds / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conllu", type=Path)
    arguments = parser.parse_args()
    texts = {"COCO's names": list(templates()), "captions": list(labelled())}
    if arguments.conllu:
        texts[arguments.conllu.name] = list(treebank(arguments.conllu))
    print(f"{'tagger':10s} {'texts':24s} {'recall':>8s} {'precision':>10s} {'ms a text':>10s}")
    for name, find in TAGGERS.items():
        for kind, given in texts.items():
            recall, precision, seconds = measure(find, given)
            print(f"{name:10s} {kind:24s} {recall:8.3f} {precision:10.3f} {seconds * 1e3:10.2f}")
    english = [text for kind in ("COCO's names", "captions") for text, _, _ in texts[kind]]
    print(
        f"English captions taken for another language: {sum(guess_language(text) != 'en' for text in english)}", end=" "
    )
    print(f"of {len(english)}")
    for code, captions in OTHERS.items():
        lines = captions.strip().splitlines()
        print(f"{code} taken for English: {[line for line in lines if guess_language(line) == 'en']} of {len(lines)}")


if __name__ == "__main__":
    main()
