"""CHAIR and POPE against figures by hand and against plain loops."""

import random
from collections import Counter

import pytest

from mmray.data.samples import Sample
from mmray.features.evaluation.chair import chair, hallucinated, pope
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Change
from mmray.features.evaluation.settings import measure_settings
from mmray.features.evaluation.summary import summarise
from mmray.objects.answers import says_yes
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.statistics import ObjectStatistics, choose_pope_objects, gather_statistics
from mmray.objects.words import ObjectWords


def summed(rows: MeasurementBuffer) -> dict[str, tuple[float | None, float | None]]:
    found = summarise(rows.tables()["measurements"], measure_settings(draws=10))
    return {name: (row["before"], row["after"]) for name, row in found.items() if row["n"]}


def test_chair_by_hand() -> None:
    lexicon = ObjectLexicon(("dog", "cat", "car", "tree"), {}, ObjectWords({"dog": ("puppy",)}))
    rows = MeasurementBuffer()
    # Three mentions before, one of them wrong; after it two, both right, of which one twice.
    chair(rows, lexicon, "a", frozenset({"dog", "tree"}), "en", "A dog, a cat and trees.", "A dog and a puppy.")
    # Nothing named before; after it two cars that are not there, of three mentions.
    chair(rows, lexicon, "b", frozenset({"cat"}), "en", "Nothing at all.", "A car, a car, a cat")
    found = summed(rows)
    assert found["chair_i"] == (1 / 3, 2 / 5)
    assert found["chair_s"] == (1 / 2, 1 / 2)
    assert found["recall"] == (2 / 3, 2 / 3)
    assert found["mean_length"] == ((6 + 3) / 2, (5 + 6) / 2)


def test_pairs_by_hand() -> None:
    pairs = [("cat", "mouse"), ("sun", "moon")]
    rows = MeasurementBuffer()
    hallucinated(rows, pairs, "a", frozenset({"cat"}), {"cat", "mouse"}, {"cat"})
    hallucinated(rows, pairs, "b", frozenset({"cat", "sun"}), {"cat", "sun"}, {"cat", "moon"})
    hallucinated(rows, pairs, "c", frozenset({"cat", "mouse"}), {"mouse"}, set())
    hallucinated(rows, pairs, "d", frozenset({"dog"}), {"mouse"}, {"mouse"})
    assert summed(rows) == {
        "hallucination": (1 / 3, 1 / 3),
        "hallucination:cat→mouse": (1 / 2, 0.0),
        "hallucination:sun→moon": (0.0, 1.0),
        "companion_named": (1.0, 0.0),
        "companion_named:cat→mouse": (1.0, 0.0),
    }


def test_absent_objects_of_every_strategy(all_scenes: list[Sample], facts: ObjectStatistics) -> None:
    cells = [set(sample.objects or ()) for sample in all_scenes]
    counts = Counter(name for cell in cells for name in cell)
    for sample in all_scenes[:40]:
        objects = frozenset(sample.objects or ())
        present, absent = choose_pope_objects(facts, objects, 2, sample.sample_id, adversarial="image")
        assert (present, absent) == choose_pope_objects(facts, objects, 2, sample.sample_id, adversarial="image")
        assert set(present) <= objects
        assert len(present) == min(2, len(objects))
        for names in absent.values():
            assert len(set(names)) == len(present)
            assert not objects & set(names)
        rest = {name: n for name, n in counts.items() if name not in objects and name not in absent["popular"]}
        assert max(rest.values()) <= min(counts[name] for name in absent["popular"])
        together = Counter(name for cell in cells for own in objects if own in cell for name in cell - objects)
        others = [together[name] for name in counts if name not in objects and name not in absent["adversarial"]]
        assert max(others) <= min(together[name] for name in absent["adversarial"])
    drawn = {
        name for s in all_scenes for name in choose_pope_objects(facts, frozenset(s.objects or ()), 1, s.sample_id)[0]
    }
    assert len(drawn) > 100


def released_adversarial(images: list[list[str]], count: int) -> list[list[str]]:
    """What POPE's code asks for: for each of the first objects, what is most often with it, once an image."""
    orders: dict[str, dict[str, int]] = {}
    for image in images:
        for name in image:
            for other in image:
                if other != name:
                    orders.setdefault(name, {}).setdefault(other, 0)
                    orders[name][other] += 1
    asked = []
    for image in images:
        chosen: list[str] = []
        for name in image[:count] if len(image) >= count else []:
            order = sorted(orders.get(name, {}).items(), key=lambda pair: pair[1], reverse=True)
            chosen += [other for other, _ in order if other not in chosen and other not in image][:1]
        asked.append(chosen)
    return asked


def test_adversarial_objects_are_those_of_the_released_code(all_scenes: list[Sample]) -> None:
    images = [list(dict.fromkeys(sample.objects or ())) for sample in all_scenes]
    facts = gather_statistics(images)
    wanted = released_adversarial(images, 3)
    found = [choose_pope_objects(facts, image, 3, "0", positives="first") for image in images]
    some = [number for number, image in enumerate(images) if len(image) >= 3]
    assert len(some) > 20
    for number, (present, absent) in enumerate(found):
        assert present == (images[number][:3] if number in some else [])
        # Where nothing else is ever together with an object, one is drawn.
        assert set(wanted[number]) <= set(absent["adversarial"])
        assert len(absent["adversarial"]) == len(present)
    whole = [number for number in some if len(wanted[number]) == 3]
    assert len(whole) > 20
    assert all(found[number][1]["adversarial"] == wanted[number] for number in whole)
    assert found != [
        choose_pope_objects(facts, image, 3, "0", positives="first", adversarial="image") for image in images
    ]


@pytest.mark.parametrize(
    ("answer", "said", "released"),
    [
        ("Yes", True, True),
        ("no, there is none", False, False),
        ("I see no yes", False, False),
        ("", None, True),
        ("There is not a dog in the image.", False, False),
        ("There is a dog in the image.", True, True),
        ("There's a dog.", True, True),
        ("The image does not contain a dog.", False, False),
        ("There isn't a dog", False, True),
        ("I don’t see one. There is a cat.", False, True),
        ("I do not see a dog. Yes, it may.", False, False),
        ("NO", False, True),
        ("No, there is not; yes, really.", False, False),
        ("Not at all", False, True),
        ("Yes, there is not only a dog but a cat.", True, False),
        ("A dog can be seen, but not a cat", False, False),
        ("Is there a dog? Yes.", True, True),
        ("I am not sure. There is a dog.", True, False),
        ("It is hard to say", None, True),
        ("I can't tell", None, True),
        ("Maybe", None, True),
        ("Nowhere, a yesterday's knot", None, True),
    ],
)
def test_yes_and_no_by_either_parser(answer: str, said: bool | None, released: bool) -> None:
    assert says_yes(answer) is said
    assert says_yes(answer, "released") is released


def test_pope_against_a_plain_loop() -> None:
    generator = random.Random(0)
    facts = gather_statistics([("a", "b"), ("c",), ("d", "e")])
    rows, asked = MeasurementBuffer(), []
    for number in range(40):
        objects = frozenset(generator.sample(facts.vocabulary, 2))
        present, absent = choose_pope_objects(facts, objects, 2, str(number))
        words = {name: generator.choices(("Yes", "No", "Maybe"), k=2) for name in facts.vocabulary}
        changes = {name: Change(*said, 1, 1, 0, None, None) for name, said in words.items()}
        pope(rows, str(number), present, absent, changes)
        asked += [(way, name in objects, words[name]) for way in absent for name in [*present, *absent[way]]]
    found = summed(rows)
    for way in ("random", "popular", "adversarial"):
        for side in (0, 1):
            pairs = [(there, said[side]) for one, there, said in asked if one == way]
            true = sum(there and said == "Yes" for there, said in pairs)
            wrong = sum(not there and said == "Yes" for there, said in pairs)
            right = true + sum(not there and said == "No" for there, said in pairs)
            precision, recall = true / (true + wrong), true / sum(there for there, _ in pairs)
            wanted = {
                "accuracy": right / len(pairs),
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / (precision + recall),
                "yes_ratio": (true + wrong) / len(pairs),
                "unparsable": sum(said == "Maybe" for _, said in pairs) / len(pairs),
            }
            for name, value in wanted.items():
                assert found[f"pope_{way}_{name}"][side] == pytest.approx(value)
    before, after = (sum(said[side] == "Yes" for *_, said in asked) / len(asked) for side in (0, 1))
    assert found["pope_yes_ratio"] == pytest.approx((before, after))
    assert found["pope_yes_ratio_change"] == pytest.approx((0, after - before))
    assert after != before
