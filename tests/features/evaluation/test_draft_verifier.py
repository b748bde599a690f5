"""Replies proven along drafts are those of generation, on every family; prompts that share a row say the same."""

from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch

from mmray.data.samples import Sample
from mmray.features.evaluation import draft_verifier
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.queries import Query, QueryError
from mmray.models.generation import generate
from mmray.models.norms import vocabulary_logits
from mmray.models.prompting import prompt_text
from mmray.models.tiny.variants import VARIANTS

QUESTIONS = ("Describe the image in few words.", "What is in the picture?", "Two birds and a fish?")


def pictures(count: int) -> list[PIL.Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 40, 56, 3), generator=generator, dtype=torch.uint8)
    return [PIL.Image.fromarray(one.numpy()) for one in pixels]


def queries_of(model: Any, count: int = 2) -> list[Query]:
    images = pictures(count)
    prompts = [prompt_text(model, question, "en") for question in QUESTIONS]
    return [Query(str(n), prompt, image, all_positions=True) for n, image in enumerate(images) for prompt in prompts]


def generated(verifier: DraftVerifier, queries: list[Query]) -> list[list[int]]:
    """What generation writes, each query by itself."""
    return [generate(verifier.model, [query.prompt], [query.image])[0] for query in queries]


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_replies_are_those_of_generation(open_model: Callable[[str], Any], variant: str) -> None:
    model = open_model(variant)
    verifier = DraftVerifier(model, 4)
    # Random weights may write the token of an image, along which no forward can be run.
    written = [(query, tokens) for query in queries_of(model) for tokens in generated(verifier, [query])]
    pairs = [(query, tokens) for query, tokens in written if model.parts.image_token_id not in tokens]
    queries, wanted = [query for query, _ in pairs], [tokens for _, tokens in pairs]
    assert len(queries) >= 4
    others = model.tokenizer(" a dog and a cat", add_special_tokens=False)["input_ids"]
    wrong = [[*tokens[:1], *others] for tokens in wanted]
    for drafts in ([[tokens] for tokens in wanted], [[tokens] for tokens in wrong], [[] for _ in queries]):
        assert [reply.tokens for reply in verifier.replies(queries, drafts)] == wanted


@pytest.mark.parametrize("longest", [1, 3, 80])
def test_replies_are_as_long_as_asked_for(open_model: Callable[[str], Any], longest: int) -> None:
    model = open_model("llava_next")
    queries = queries_of(model)
    wanted = [generate(model, [query.prompt], [query.image], longest)[0] for query in queries]
    assert max(map(len, wanted)) == longest
    pairs = [
        (query, tokens)
        for query, tokens in zip(queries, wanted, strict=True)
        if model.parts.image_token_id not in tokens
    ]
    queries, wanted = [query for query, _ in pairs], [tokens for _, tokens in pairs]
    verifier = DraftVerifier(model, 4, longest)
    # A draft that goes on is cut where generation stops.
    for drafts in ([[] for _ in queries], [[[*tokens, 5, 5]] for tokens in wanted]):
        assert [reply.tokens for reply in verifier.replies(queries, drafts)] == wanted
    before = BaselineReplies(model, 4, longest=longest)
    assert before.verifier.longest == longest


def test_prompts_of_all_lengths_are_generated_together(
    open_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model("llava")
    queries, sizes = queries_of(model), []
    wanted = generated(DraftVerifier(model, 4), queries)

    def counted(_: Any, prompts: list[str], *rest: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        return generate(model, prompts, *rest)

    monkeypatch.setattr(draft_verifier, "generate", counted)
    assert [reply.tokens for reply in DraftVerifier(model, 4).replies(queries, [[] for _ in queries])] == wanted
    assert sizes[:2] == [4, 2]


@pytest.mark.slow
def test_the_families_whose_prompts_share_a_row(open_model: Callable[[str], Any]) -> None:
    """Where they can, the states are those of rows of their own; the others are found out, not believed."""
    sharing = set()
    for variant in VARIANTS:
        model = open_model(variant)
        queries = queries_of(model)
        words = model.tokenizer(" a dog and", add_special_tokens=False)["input_ids"]
        replies = [words[: 1 + number % 3] for number in range(len(queries))]
        one, other = DraftVerifier(model, 4), DraftVerifier(model, 4)
        other.shares = False
        for shared, alone in zip(one.states_along(queries, replies), other.states_along(queries, replies), strict=True):
            ours, theirs = (vocabulary_logits(model, s.hidden).log_softmax(dim=1) for s in (shared, alone))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
            assert shared.top is not None
            assert alone.top is not None
            assert shared.top.shape == alone.top.shape
        if one.shares:
            sharing.add(variant)
    apart = {"mllama", "paligemma", "blip2_opt", "blip2_t5", "instructblip_vicuna", "instructblip_t5"}
    assert sharing == set(VARIANTS) - apart


def test_settings_that_penalise_tokens_are_respected(open_model: Callable[[str], Any]) -> None:
    model = open_model("llava")
    queries = queries_of(model)
    before = generated(DraftVerifier(model, 4), queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.network.generation_config, "repetition_penalty", 3.0)
        verifier = DraftVerifier(model, 4)
        wanted = generated(verifier, queries)
        replies = verifier.replies(queries, [[tokens] for tokens in before])
    assert wanted != before
    assert [reply.tokens for reply in replies] == wanted
    assert not any(reply.verified for reply in replies)


def test_several_drafts_and_texts_of_the_demo(demo: Any, scenes: list[Sample], before: BaselineReplies) -> None:
    queries = [before.query(sample, question) for sample in scenes for question, _ in sample.questions or ()]
    replies = before.replies(queries, [["Yes", "No"] for _ in queries])
    said = {reply.text for reply in replies}
    assert {"Yes", "No"} < said
    written = before.verifier.generate(queries)
    assert [reply.tokens for reply in replies] == written
    # The states are along the reply, not along the draft.
    for reply in replies:
        likeliest = vocabulary_logits(demo, reply.hidden).argmax(dim=1).tolist()
        assert likeliest[:-1] == reply.tokens
        assert likeliest[-1] in before.verifier.ends


def test_what_the_model_cannot_be_given_is_named(open_model: Callable[[str], Any]) -> None:
    model = open_model("llava")
    queries = queries_of(model)
    bad = Query("bad", "no place for an image", queries[0].image)
    with pytest.raises(QueryError) as raised:
        DraftVerifier(model, 4).states_along([*queries, bad], [[5]] * (len(queries) + 1))
    assert raised.value.query is bad
