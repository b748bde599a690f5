"""Scores of replies are those of the benchmarks' own formulas."""

import random
from functools import cache
from itertools import combinations

import pytest

from mmray.errors import InputError
from mmray.objects.answer_scores import SCORES, AnswerScore, answer_score, normalised, score_reply

WORDS = ("yes", "no", "two", "2", "a dog", "The dog.", "dogs", "blue/white")


def score(name, reply, answers):
    return score_reply(answer_score(name), "What?", reply, answers)


@pytest.mark.parametrize("seed", range(20))
def test_vqa_accuracy_is_the_mean_over_all_groups_of_nine(seed):
    """Antol et al. 2015: min(1, people who gave the reply / 3), averaged over all 10 choose 9 groups of people."""
    draw = random.Random(seed)
    answers, reply = [draw.choice(WORDS) for _ in range(10)], draw.choice(WORDS)
    groups = list(combinations(answers, 9))
    given = [sum(normalised(answer) == normalised(reply) for answer in group) for group in groups]
    assert score("vqa", reply, answers) == pytest.approx(sum(min(1, count / 3) for count in given) / len(groups))


def test_vqa_accuracy_by_hand():
    assert [score("vqa", "cat", ["cat"] * n + ["dog"] * (10 - n)) for n in range(6)] == pytest.approx(
        [0, 0.3, 0.6, 0.9, 1, 1]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two  dogs\n", "2 dogs"),
        ("dont know", "don't know"),
        ("wouldn'tve", "wouldn't've"),
        ("the girl's hat", "girl's hat"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("yes, sir!", "yes sir"),
        ("none", "0"),
    ],
)
def test_answers_are_normalised_as_the_evaluation_s_page_says(text, expected):
    """VQA's page: lower case, no articles, digits for number words, apostrophes of contractions; these examples."""
    assert normalised(text) == expected == normalised(expected)


def distance(one, other):
    """Return the Levenshtein distance by its recursive definition."""

    @cache
    def of(i, j):
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return of(len(one), len(other))


@pytest.mark.parametrize("seed", range(20))
def test_anls_is_the_nearest_answer_s_similarity(seed):
    """Biten et al. 2019, eq. 1: max over answers of 1 − NL where NL < 0.5, else 0."""
    draw = random.Random(seed)
    texts = ["".join(draw.choice("abC ") for _ in range(draw.randint(1, 8))) for _ in range(4)]
    reply, answers = texts[0], texts[1:]
    found = []
    for answer in answers:
        one, other = reply.strip().lower(), answer.strip().lower()
        longest = max(len(one), len(other))
        nl = distance(one, other) / longest if longest else 0
        found.append(1 - nl if nl < 0.5 else 0)
    assert score("anls", reply, answers) == pytest.approx(max(found))


def test_anls_at_the_threshold():
    assert score("anls", "abcd", ["abxy"]) == 0
    assert score("anls", "abcd", ["abcy", "zzzz"]) == 0.75


def test_exact_match_and_option_letters():
    assert score("exact", " Yes. ", ["no", "yes"]) == 1
    assert score("exact", "yes it is", ["yes"]) == 0
    assert [score("letter", reply, ["B"]) for reply in ("B", "(B) lung", "b: lung", "Answer: B", "A", "Bone")] == [
        1, 1, 0, 1, 0, 0,
    ]  # fmt: skip
    assert score("letter", "C", ["C: heart"]) == 1


def test_a_judge_is_any_function_of_question_reply_and_answers():
    judge = AnswerScore("test", lambda question, reply, answers: (len(question) + len(reply) + len(answers)) / 10)
    assert score_reply(judge, "What?", "so", ["a", "b"]) == 0.9
    assert answer_score("math:hypot").definition == "judged by math:hypot"
    with pytest.raises(ValueError, match=r"12\.0 is not from 0 to 1"):
        score_reply(AnswerScore("test", lambda *_: 12), "What?", "so", ["a"])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bleu", "unknown score 'bleu'; choose from begins, exact, letter, vqa, anls, or write MODULE:FUNCTION"),
        ("no_such_module:judge", "judge no_such_module:judge: No module named 'no_such_module'"),
        ("math:no_such", "judge math:no_such: module 'math' has no attribute 'no_such'"),
        ("math:pi", "judge math:pi: float is not a function"),
    ],
)
def test_a_score_that_can_t_be_found_is_refused_in_one_line(name, problem):
    with pytest.raises(InputError, match=problem):
        answer_score(name)


def test_few_answers_have_no_vqa_accuracy():
    with pytest.raises(ValueError, match="needs the answers of several people"):
        score("vqa", "yes", ["yes"] * 3)
    assert all(one.definition for one in SCORES.values())
