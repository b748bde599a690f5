"""General text without an image: what is shipped, and what an edit does to replies and to plain text."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.features import editing
from mmray.features.evaluation import held_out_text
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.comparing import log_likelihoods
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.evaluator import EditEvaluator
from mmray.features.evaluation.held_out_text import HeldOutText, held_out_texts, measure_held_out
from mmray.features.evaluation.last_layer import LastLayer
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Change, Query, Reply, States
from mmray.features.evaluation.settings import measure_settings
from mmray.features.evaluation.summary import summarise
from mmray.models.prompting import encode, prompt_text
from mmray.objects.statistics import ObjectStatistics
from tests.support.standin import Purpose, StandIn, neuron_edit, swap

SETTINGS = measure_settings(draws=50)
HALVED = StandIn((Purpose("noise"),), scale=(7, 0.5))


def summed(rows: MeasurementBuffer) -> dict[str, dict[str, Any]]:
    found = summarise(rows.tables()["measurements"], SETTINGS)
    return {name: row for name, row in found.items() if row["n"]}


def never(text: str, language: str) -> bool:
    return False


def passages(count: int) -> list[HeldOutText]:
    return held_out_texts(count, 0)[count:]


def strings(content: Any) -> Iterator[str]:
    """Yield every text in JSON."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from strings(part)


def plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def test_the_shipped_texts_are_many_different_and_in_several_languages() -> None:
    texts = held_out_texts(1000, 0)
    prompts, plain_texts = (
        [text for text in texts if (text.continuation is None) == is_prompt] for is_prompt in (True, False)
    )
    assert len(prompts) == 40 < measure_settings().text_count
    assert len(plain_texts) == 20
    for some in (prompts, plain_texts):
        assert len({plain(text.prompt) for text in some}) == len({text.name for text in some}) == len(some)
        languages = Counter(text.language for text in some)
        assert len(languages) >= 6
        assert languages["en"] >= len(some) / 2
    assert held_out_texts(0, 0) == []
    assert held_out_texts(5, 1) != held_out_texts(5, 2)
    assert set(held_out_texts(5, 1)) < set(texts)


def test_no_text_is_one_that_editing_keeps() -> None:
    """An edit that learned to keep these very replies would look better than it is."""
    ours = {plain(part) for text in held_out_texts(1000, 0) for part in (text.prompt, text.continuation or "") if part}
    for file in Path(editing.__path__[0]).glob("*.json"):
        theirs = {plain(text) for text in strings(json.loads(file.read_text("utf-8")))}
        assert ours & theirs == set(), file.name
        assert [text for text in theirs if len(text) > 20 and any(text in one for one in ours)] == []


@torch.no_grad()
def test_log_likelihoods_against_plain_forwards(demo: Any, before: BaselineReplies) -> None:
    texts = passages(3)
    queries = [Query(text.name, text.prompt, None) for text in texts]
    replies = before.forced(queries, [text.continuation or "" for text in texts])
    found = log_likelihoods(before.text_verifier, HALVED, queries, replies)

    def likelihood(query: Query, reply: Reply) -> float:
        batch = encode(demo, [query.prompt], [None], [reply.tokens], [[]])
        logits = demo.network(**batch.to(demo.device, demo.network.dtype)).logits[0].log_softmax(dim=1)
        start = batch.caption_start[0] - 1
        return sum(float(logits[start + place, token]) for place, token in enumerate(reply.tokens))

    wanted = [likelihood(query, reply) for query, reply in zip(queries, replies, strict=True)]
    with HALVED.applied(demo):
        changed = [likelihood(query, reply) for query, reply in zip(queries, replies, strict=True)]
    assert [row[0] for row in found] == pytest.approx(wanted, rel=1e-4)
    assert [row[1] for row in found] == pytest.approx(changed, rel=1e-4)
    assert all(abs(one - other) > 1 for one, other in found)
    assert "".join(before.text_verifier.text(replies[0].tokens).split()) == "".join(
        (texts[0].continuation or "").split()
    )


def test_an_edit_of_the_last_layer_has_the_perplexity_of_a_forward(
    demo: Any, before: BaselineReplies, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = passages(4)
    edit = neuron_edit(demo, [7])
    found = summed(measure_held_out(before, edit, texts, never))
    monkeypatch.setattr(LastLayer, "of", classmethod(lambda *_: None))
    wanted = summed(measure_held_out(before, edit, texts, never))
    for name in ("perplexity", "perplexity_ratio"):
        assert found[name]["after"] == pytest.approx(wanted[name]["after"], rel=1e-4)
    assert found["perplexity_ratio"]["after"] != pytest.approx(1, abs=0.01)


def test_perplexity_and_its_ratio(before: BaselineReplies) -> None:
    texts = passages(6)
    found = summed(measure_held_out(before, HALVED, texts, never))
    perplexity, ratio = found["perplexity"], found["perplexity_ratio"]
    assert perplexity["n"] == ratio["n"] == 6
    assert ratio["before"] == 1
    assert ratio["after"] == pytest.approx(perplexity["after"] / perplexity["before"])
    # Paired by passage: how hard a passage is has no part in how much harder it became.
    assert ratio["high"] / ratio["low"] < perplexity["high"] / perplexity["low"]
    alone = [summed(measure_held_out(before, HALVED, [text], never))["perplexity_ratio"]["after"] for text in texts]
    assert min(alone) < ratio["after"] < max(alone)


def test_replies_are_those_of_generation(demo: Any, before: BaselineReplies) -> None:
    prompts = [text for text in held_out_texts(12, 0) if text.continuation is None]
    found = summed(measure_held_out(before, replace(HALVED, scale=(7, 0.2)), prompts, never))
    queries = [Query(t.name, prompt_text(demo, t.prompt, t.language, image=False), None) for t in prompts]
    verifier = DraftVerifier(demo, 4)
    own = verifier.generate(queries)
    with replace(HALVED, scale=(7, 0.2)).applied(demo):
        edited = verifier.generate(queries)
    same = sum(one == other for one, other in zip(own, edited, strict=True))
    assert found["text_only_64"]["n"] == len(prompts)
    assert 0 < same < len(prompts)
    assert found["text_only_64"]["after"] == same / len(prompts)
    assert found["text_only_kl"]["after"] > 0


def test_lengths_and_weights_of_replies(before: BaselineReplies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four replies, those of up to 16 tokens have a share of their own, and KL is per token and end."""
    lengths, same, kl = (5, 16, 17, 64), (True, False, True, False), (0.1, 0.2, 0.3, 0.4)
    replies = [Reply([0] * n, "a", States(torch.zeros(n + 1, 2)), verified=True) for n in lengths]
    changes = [Change("a", "a" if each else "b", 1, 1, value, None, None) for each, value in zip(same, kl, strict=True)]
    monkeypatch.setattr(before, "replies", lambda *_: replies)
    monkeypatch.setattr(held_out_text, "compare", lambda *_: changes)
    prompts = [HeldOutText(f"prompt {n}", "en", "Why?") for n in lengths]
    found = summed(measure_held_out(before, HALVED, prompts, never))
    assert (found["text_only_16"]["n"], found["text_only_16"]["after"]) == (2, 1 / 2)
    assert (found["text_only_64"]["n"], found["text_only_64"]["after"]) == (4, 2 / 4)
    weighted = sum((n + 1) * value for n, value in zip(lengths, kl, strict=True)) / sum(n + 1 for n in lengths)
    assert found["text_only_kl"]["after"] == pytest.approx(weighted)


def test_replies_are_as_long_whatever_captions_are(demo: Any, before: BaselineReplies) -> None:
    prompts = [text for text in held_out_texts(40, 0) if text.continuation is None]
    short = BaselineReplies(demo, longest=1)
    one, other = (summed(measure_held_out(baseline, HALVED, prompts, never)) for baseline in (short, before))
    assert [row["after"] for row in one.values()] == pytest.approx([row["after"] for row in other.values()], rel=1e-4)


def test_texts_about_an_edited_word_are_left_out(before: BaselineReplies, facts: ObjectStatistics) -> None:
    texts = [
        HeldOutText("prompt 0", "en", "Name three animals."),
        HeldOutText("prompt 1", "en", "How old do cats become?"),
        HeldOutText("passage 0", "en", "It was dark.", "Nobody saw the dog in the yard."),
        HeldOutText("passage 1", "en", "It was late.", "Nobody was in the street."),
    ]
    evaluator = EditEvaluator(before, swap("cat", "dog"), facts, SETTINGS)
    found = summed(evaluator.held_out(texts))
    assert (found["text_only_64"]["n"], found["perplexity"]["n"]) == (1, 1)
    # What the model replies decides too: here, a word of the edit.
    (reply,) = before.replies(
        [Query("prompt 0", prompt_text(before.model, texts[0].prompt, "en", image=False), None)], [[]]
    )
    about = EditEvaluator(before, swap(reply.text.rstrip(".").casefold(), "dog"), facts, SETTINGS)
    assert "text_only_64" not in summed(about.held_out(texts[:1]))


def test_a_text_that_the_model_cannot_run_is_a_row(before: BaselineReplies) -> None:
    texts = [
        HeldOutText("prompt 0", "en", "Name three animals."),
        HeldOutText("passage 0", "en", "<image> <image>", "A"),
    ]
    rows = measure_held_out(before, HALVED, texts, never)
    assert [(row["sample_id"], row["stage"]) for row in rows.errors] == [("passage 0", "forward")]
    assert summed(rows)["text_only_64"]["n"] == 1


def test_the_unedited_model_is_asked_once(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline, asked = BaselineReplies(demo), []
    along = DraftVerifier.states_along
    monkeypatch.setattr(
        DraftVerifier,
        "states_along",
        lambda self, some, tokens: (asked.append(len(some)), along(self, some, tokens))[1],
    )
    texts = [*held_out_texts(4, 0)[:4], *passages(2)]
    first = summed(measure_held_out(baseline, HALVED, texts, never))
    once = sum(asked)
    asked.clear()
    assert summed(measure_held_out(baseline, HALVED, texts, never)) == first
    # The edited model along every text, and along corrected drafts of the replies that changed.
    assert len(texts) <= sum(asked) <= once
