"""Text-only models: every family's parts are found and proven, plain text is read from a start token on."""

import json
import shutil

import pytest
import torch
import transformers

from mmray.errors import InputError
from mmray.features.census.model_check import abilities_of, check_model
from mmray.models.capture import capture_input
from mmray.models.generation import generate
from mmray.models.interventions import ablate
from mmray.models.loading import describe_model
from mmray.models.parts import output_rows, set_output_rows, unembedding_rows
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.models.tiny.checkpoints import randomise
from mmray.models.tiny.texts import FAMILIES, PROBED
from mmray.neurons.activation_cache import forward
from mmray.neurons.validation import IMAGE_SEEN, claims_of
from tests.support.samples import picture

TEXT = "An image of a dog and a cat."


@pytest.mark.parametrize("family", [*FAMILIES, *PROBED])
def test_every_family_is_found_and_proven(open_text_model, family):
    model = open_text_model(family)
    assert model.parts.family == ("probed" if family in PROBED else family)
    assert (model.parts.image, model.parts.image_token_id) == ("none", None)
    checks = check_model(model)
    assert [check for check in checks if not check.passed] == []
    assert {check.name for check in checks} >= set(claims_of(model))
    assert IMAGE_SEEN not in claims_of(model)
    problems = {one.name: one.problem for one in abilities_of(model)}
    without = {name for name, problem in problems.items() if problem == "the model reads text only"}
    assert {"heat maps, saliency", "captions of an image share a row", "neurons of the vision tower"} <= without
    assert any("POPE" in name for name in without)
    described = describe_model(model.name)
    assert (described["widths"], described["image_tokens"]) == (list(model.widths), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_to_what_the_mlps_write(open_text_model, family):
    """To each token of the text: the sum over neurons is MLP write · unembedding, without the projection's bias."""
    model = open_text_model(family)
    scored = model.contributions(None, TEXT, "dog").sum(dim=1)
    tokens, offsets = tokenize_caption(model, "", TEXT)
    batch = encode(model, [""], [None], [tokens], [offsets])
    number = next(index for index, (_, stop) in enumerate(offsets) if stop > TEXT.index("dog"))
    row = batch.caption_start[0] + number - 1
    column = unembedding_rows(model.network, model.parts)[tokens[number]].float()
    for layer, projection in enumerate(model.projections):
        module, inputs = model.network.get_submodule(projection.path), []
        with capture_input(module, inputs.append):
            forward(model, batch)
        states = inputs[0].flatten(0, -2)[row][None]
        write = (module(states) - module(torch.zeros_like(states)))[0].float()
        # In units of what single neurons contribute, which may cancel.
        scale = float(model.contributions(None, TEXT, "dog")[layer].abs().sum())
        if projection.post_norm is None:
            assert abs(float(scored[layer] - write @ column)) <= 1e-5 * scale


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_begins_after_one_start_token_which_does_not_count(open_text_model, family):
    model = open_text_model(family)
    assert prompt_text(model, None, "en", image=False) == prompt_text(model, "", "de", image=False) == ""
    tokens, offsets = tokenize_caption(model, "", TEXT)
    batch = encode(model, ["", ""], [None, None], [tokens, tokens[:3]], [offsets, offsets[:3]])
    start = model.tokenizer.bos_token_id
    assert batch.inputs["input_ids"][0].tolist() == [start, *tokens]
    assert batch.inputs["attention_mask"][1].tolist() == [1] * 4 + [0] * (len(tokens) - 3)
    assert batch.caption_start == [1, 1]
    assert [(span.start, span.stop, span.modality) for span in batch.spans] == [
        (1, 1 + len(tokens), "text"),
        (1, 4, "text"),
    ]
    assert "".join(TEXT[a:b] for a, b in offsets) == TEXT


def test_the_rows_of_a_conv1d_are_those_of_w_out(open_text_model):
    """GPT-2 keeps the transpose of what a Linear does."""
    model = open_text_model("gpt2")
    module = model.network.get_submodule(model.projections[1].path)
    rows = output_rows(model.network, model.projections[1])
    assert rows.shape == (model.widths[1], 32)
    units, before = torch.tensor([3, 5]), module.weight.detach().clone()
    unit = torch.zeros(1, model.widths[1])
    unit[0, 5] = 1
    assert torch.allclose(module(unit) - module(0 * unit), rows[5], atol=1e-6)
    set_output_rows(model.network, model.projections[1], units, torch.zeros(2, 32))
    try:
        assert module.weight[5].abs().sum() == 0
        assert torch.equal(module.weight[4], before[4])
    finally:
        module.weight.copy_(before)


def test_a_neuron_without_effect_is_one_whose_row_is_zero(open_text_model):
    model = open_text_model("bloom")
    tokens, offsets = tokenize_caption(model, "", TEXT)
    batch = encode(model, [""], [None], [tokens], [offsets]).to(model.device, torch.float32)
    plain = model.network(**batch).logits
    with ablate(model, ["L0.u3"]):
        assert not torch.equal(model.network(**batch).logits, plain)
    assert torch.equal(model.network(**batch).logits, plain)


def test_a_question_goes_into_the_chat_template_and_plain_text_does_not(text_model, tmp_path):
    from mmray.models.loading import load

    folder = shutil.copytree(text_model("qwen2"), tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<s>user: {{ m['content'] }} bot:{% endfor %}")
    model = load(str(folder))
    assert prompt_text(model, "Who?", "en", image=False) == "<s>user: Who? bot:"
    assert prompt_text(model, None, "en", image=False) == ""
    assert prompt_text(model, None, "en", image=False, prefix="The dog") == "The dog"
    # The template wrote the start token.
    tokens, offsets = tokenize_caption(model, "<s>user: Who? bot:", "A dog")
    batch = encode(model, ["<s>user: Who? bot:"], [None], [tokens], [offsets])
    assert batch.inputs["input_ids"][0].tolist().count(model.tokenizer.bos_token_id) == 1


def test_generation_stops_at_the_context(open_text_model):
    model = open_text_model("gpt2")
    prompt = " ".join(["dog"] * 25)
    before = len(model.tokenizer(prompt)["input_ids"])
    assert before < 64
    (written,) = generate(model, [prompt], [None], 100)
    assert before + len(written) <= 64


def test_images_are_refused_in_one_line(open_text_model):
    model = open_text_model("llama")
    for ask in (
        lambda: model.caption(picture(1)),
        lambda: model.heat_map(picture(1), "L0.u1"),
        lambda: model.contributions(picture(1), TEXT, "dog"),
    ):
        with pytest.raises(InputError, match="reads text only") as refusal:
            ask()
        assert "\n" not in str(refusal.value)


def test_a_model_that_sees_later_words_is_refused(text_model, tmp_path):
    """BERT as a language model, without a causal mask."""
    config = transformers.BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    network = transformers.BertLMHeadModel(config)
    # Untrained, what a token sees of others would be next to nothing.
    randomise(network, "bert")
    network.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text_model("gpt2") / name, tmp_path)
    from mmray.neurons.model import load_model

    with pytest.raises(InputError, match="later words are hidden fails"):
        load_model(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
