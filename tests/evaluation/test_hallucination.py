"""CHAIR and POPE against figures by hand and against plain loops."""

import random
from collections import Counter

import pytest

from mmray.datasets.samples import Sample
from mmray.evaluation.asks import Change
from mmray.evaluation.facts import DataFacts, gather_facts
from mmray.evaluation.hallucination import asked_objects, chair, hallucinated, pope, says_yes
from mmray.evaluation.naming import Naming
from mmray.evaluation.rows import Rows
from mmray.evaluation.settings import measure_settings
from mmray.evaluation.summary import summarise


def summed(rows: Rows) -> dict[str, tuple[float | None, float | None]]:
    found = summarise(rows.tables()["measurements"], measure_settings(draws=10))
    return {name: (row["before"], row["after"]) for name, row in found.items() if row["n"]}


def test_chair_by_hand() -> None:
    naming = Naming(("dog", "cat", "car", "tree"), {}, {"dog": ("puppy",)})
    rows = Rows()
    # Three mentions before, one of them wrong; after it two, both right, of which one twice.
    chair(rows, naming, "a", frozenset({"dog", "tree"}), "en", "A dog, a cat and trees.", "A dog and a puppy.")
    # Nothing named before; after it two cars that are not there, of three mentions.
    chair(rows, naming, "b", frozenset({"cat"}), "en", "Nothing at all.", "A car, a car, a cat")
    found = summed(rows)
    assert found["chair_i"] == (1 / 3, 2 / 5)
    assert found["chair_s"] == (1 / 2, 1 / 2)
    assert found["recall"] == (2 / 3, 2 / 3)
    assert found["mean_length"] == ((6 + 3) / 2, (5 + 6) / 2)


def test_pairs_by_hand() -> None:
    pairs = [("cat", "mouse"), ("sun", "moon")]
    rows = Rows()
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


def test_absent_objects_of_every_strategy(all_scenes: list[Sample], facts: DataFacts) -> None:
    cells = [set(sample.objects or ()) for sample in all_scenes]
    counts = Counter(name for cell in cells for name in cell)
    for sample in all_scenes[:40]:
        objects = frozenset(sample.objects or ())
        present, absent = asked_objects(facts, objects, 2, sample.sample_id)
        assert (present, absent) == asked_objects(facts, objects, 2, sample.sample_id)
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
    drawn = {name for s in all_scenes for name in asked_objects(facts, frozenset(s.objects or ()), 1, s.sample_id)[0]}
    assert len(drawn) > 100


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", True), ("no, there is none", False), ("Not at all", None), ("I see no yes", False), ("", None)],
)
def test_the_first_yes_or_no_counts(answer: str, said: bool | None) -> None:
    assert says_yes(answer) is said


def test_pope_against_a_plain_loop() -> None:
    generator = random.Random(0)
    facts = gather_facts([("a", "b"), ("c",), ("d", "e")])
    rows, asked = Rows(), []
    for number in range(40):
        objects = frozenset(generator.sample(facts.vocabulary, 2))
        present, absent = asked_objects(facts, objects, 2, str(number))
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
