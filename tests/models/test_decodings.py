"""Decodings choose what their published formulas choose, computed step by step without a cache, a batch or padding."""

import zlib

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmray.errors import InputError
from mmray.models import combined_logits
from mmray.models.combined_logits import PIXELS, CombinedLogits, combined
from mmray.models.decodings import DECODINGS, GREEDY, PAI_GAMMA, decoding_of
from mmray.models.generation import check_decoding, generate
from mmray.models.image_attention import ImageAttention
from mmray.models.processing import IMAGE_MASK
from mmray.models.prompting import encode, prompt_text
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import hooks, picture

PROMPTS = ("en", "fr", "en")
STEPS = 4
NEED_IMAGE = ("instructblip_vicuna", "instructblip_t5", "blip2_opt", "blip2_t5")
"""Their network does not run without an image."""
NO_TOKENS = ("instructblip_t5", "blip2_t5", "mllama")
"""Their decoder's sequence has no image."""


def log_probs(logits):
    return logits.double().log_softmax(dim=-1)


def forward(model, prompt, image, tokens, change=lambda inputs: inputs):
    """Return log-probabilities of the token after these, in one forward without a cache."""
    batch = encode(model, [prompt], [image], [tokens], [[(0, 0)] * len(tokens)])
    inputs = change(batch.to(model.device, model.network.dtype))
    with torch.inference_mode():
        return log_probs(model.network(**inputs, use_cache=False).logits[0, batch.caption_start[0] + len(tokens) - 1])


def noised(image):
    """Return the change of inputs by 500 of 1000 steps of diffusion: x ← √(1 − β) x + √β ε adds up to one step."""
    kept = 1.0
    for step in range(501):
        beta = float(torch.sigmoid(torch.tensor(-6 + 12 * step / 999))) * (0.5e-2 - 1e-5) + 1e-5
        kept *= 1 - beta
    generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes()))

    def change(inputs):
        noise = torch.randn(inputs[PIXELS].shape, generator=generator)
        return inputs | {PIXELS: kept**0.5 * inputs[PIXELS] + (1 - kept) ** 0.5 * noise}

    return change


def without_image(model, prompt, image, tokens):
    """Return log-probabilities of the next token after the prompt without its image, positions left to the model."""
    batch = encode(model, [prompt], [image], [tokens], [[(0, 0)] * len(tokens)])
    ids = batch.inputs["input_ids"]
    is_image = batch.inputs[IMAGE_MASK].bool() if IMAGE_MASK in batch.inputs else ids == model.parts.image_token_id
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: batch.inputs[name][~is_image][None] for name in names if name in batch.inputs}
    with torch.inference_mode():
        return log_probs(model.network(**inputs, use_cache=False).logits[0, -1])


class Amplified:
    """Plain attention over the whole sequence, amplified at the positions that predict the reply."""

    def __init__(self, model, prompt, image, alpha):
        batch = encode(model, [prompt], [image], [[]], [[]])
        self.first = batch.caption_start[0] - 1
        self.image = batch.image_positions(0)
        self.alpha = alpha
        self.layers = [layer for layer in range(len(model.widths)) if layer >= round(len(model.widths) / 16)]
        self.kind = model.network.config.get_text_config()._attn_implementation
        self.decoder = {
            module
            for name, module in model.network.named_modules()
            if any(name.startswith(model.projections[layer].path.split(".mlp")[0] + ".") for layer in self.layers)
        }

    def __enter__(self):
        base = ALL_ATTENTION_FUNCTIONS[self.kind]

        def attention(module, query, key, value, attention_mask=None, **more):
            mask = attention_mask
            if module not in self.decoder:
                return base(module, query, key, value, attention_mask, **more)
            groups = query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
            scores = query @ key.transpose(2, 3) * more["scaling"]
            for row in range(self.first, query.shape[2]):
                for column in self.image:
                    scores[:, :, row, column] += self.alpha * scores[:, :, row, column].abs()
            length = query.shape[2]
            seen = torch.ones(length, length).tril().bool()
            if mask is not None:
                seen = mask[0, 0, :, :length] if mask.dtype == torch.bool else mask[0, 0, :, :length] == 0
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            return (weights @ value).transpose(1, 2), None

        ALL_ATTENTION_FUNCTIONS[self.kind] = attention

    def __exit__(self, *_):
        del ALL_ATTENTION_FUNCTIONS[self.kind]


def reference(model, prompt, image, tokens, decoding):
    """Return the scores of the next token by the papers' formulas."""
    if decoding.name == "vcd":
        own = forward(model, prompt, image, tokens)
        other = forward(model, prompt, image, tokens, noised(image))
        scores = (1 + decoding.strength) * own - decoding.strength * other
    elif decoding.name == "no-image":
        own = forward(model, prompt, image, tokens)
        other = without_image(model, prompt, image, tokens)
        scores = (1 + decoding.strength) * own - decoding.strength * other
    else:
        with Amplified(model, prompt, image, decoding.strength):
            own = forward(model, prompt, image, tokens)
        other = without_image(model, prompt, image, tokens)
        scores = PAI_GAMMA * own - (PAI_GAMMA - 1) * other
    return torch.where(own.exp() >= 0.1 * own.exp().max(), scores, -torch.inf)


@pytest.fixture
def recorded(monkeypatch):
    """The scores that `generate` chose by, a tensor per step."""
    found = []
    call = CombinedLogits.__call__

    def record(self, input_ids, scores):
        result = call(self, input_ids, scores)
        found.append(result[: self.images].double())
        return result

    monkeypatch.setattr(CombinedLogits, "__call__", record)
    return found


@pytest.mark.parametrize("name", ["vcd:0.7", "no-image:0.7", "pai:0.4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_a_padded_batch_are_those_of_the_formula(open_model, recorded, variant, name):
    model, decoding = open_model(variant), decoding_of(name)
    prompts = [prompt_text(model, None, language) for language in PROMPTS]
    images = [picture(20), picture(21, 56, 40), picture(22)]
    if (decoding.name == "pai" and variant in NO_TOKENS) or (decoding.name != "vcd" and variant in NEED_IMAGE):
        with pytest.raises(InputError, match=r"no tokens of the prompt|does not run without an image"):
            generate(model, prompts, images, STEPS, decoding)
        return
    written = generate(model, prompts, images, STEPS, decoding)
    # Where packed pixels don't say whose they are, replies are written one by one.
    alone = len(recorded) > STEPS
    compared = 0
    for row, (prompt, image, tokens) in enumerate(zip(prompts, images, written, strict=True)):
        steps = recorded[row * STEPS : (row + 1) * STEPS] if alone else recorded
        for step in range(min(len(tokens) + 1, len(steps))):
            found = steps[step][0 if alone else row]
            expected = reference(model, prompt, image, tokens[:step], decoding)
            both = found.isfinite() & expected[: len(found)].isfinite()
            # At the border of what is plausible, rounding may decide.
            assert (found.isfinite() != expected[: len(found)].isfinite()).sum() <= 1
            assert both.any()
            torch.testing.assert_close(found[both], expected[: len(found)][both], rtol=0, atol=2e-3)
            compared += 1
    assert compared >= 6


def replies(model, name, images=3):
    prompts = [prompt_text(model, None, language) for language in PROMPTS[:images]]
    pictures = [picture(20), picture(21, 56, 40), picture(22)][:images]
    return generate(model, prompts, pictures, STEPS, decoding_of(name) if name else GREEDY)


@pytest.mark.parametrize("name", DECODINGS)
def test_without_strength_the_likeliest_token_is_taken(open_model, name):
    model = open_model("llava")
    # PAI without amplification still has its contrast.
    expected = replies(model, "no-image:0.1" if name == "pai" else None)
    assert replies(model, f"{name}:0") == expected
    assert decoding_of(f"{name}:0").plain == (name != "pai")


@pytest.mark.parametrize("name", DECODINGS)
def test_a_batch_scores_as_each_image_alone(open_model, recorded, name):
    model, decoding = open_model("llava"), decoding_of(name)
    prompt, images = prompt_text(model, None, "en"), [picture(20), picture(21, 56, 40)]
    together = generate(model, [prompt] * 2, images, STEPS, decoding)
    found, recorded[:] = list(recorded), []
    for row, image in enumerate(images):
        assert generate(model, [prompt], [image], STEPS, decoding) == [together[row]]
        for step, scores in enumerate(recorded[: len(together[row])]):
            torch.testing.assert_close(scores[0], found[step][row], rtol=0, atol=1e-4)
        recorded.clear()


def test_average_is_the_mean_over_views(open_model, recorded):
    model = open_model("llava")
    prompt, image = prompt_text(model, None, "en"), picture(20)
    generate(model, [prompt], [image], 1, decoding_of("average"))
    views = [image, *combined_logits.views_of([image], decoding_of("average"))]
    assert len({view.tobytes() for view in views}) == 4 and {view.size for view in views} == {image.size}
    expected = torch.stack([forward(model, prompt, view, []) for view in views]).mean(dim=0)
    both = recorded[0][0].isfinite()
    torch.testing.assert_close(recorded[0][0][both], expected[: len(both)][both], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_before(open_model, fails, monkeypatch):
    model = open_model("llava")
    before, attention, count = replies(model, None), ALL_ATTENTION_FUNCTIONS["sdpa"], hooks(model.network)
    if fails:
        monkeypatch.setattr(ImageAttention, "_replaced", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replies(model, "pai")
    else:
        assert replies(model, "pai:5") != before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    assert hooks(model.network) == count
    assert replies(model, None) == before


def test_prompts_without_an_image_are_continued_greedily(open_model):
    model = open_model("llava")
    prompts = [prompt_text(model, None, "en", image=False)] * 2
    greedy = generate(model, prompts, [None] * 2, STEPS)
    assert all(generate(model, prompts, [None] * 2, STEPS, decoding_of(name)) == greedy for name in DECODINGS)


def test_attention_that_can_not_be_reached_is_refused(open_model, monkeypatch):
    model = open_model("llava")
    monkeypatch.setattr(model.network.config.get_text_config(), "_attn_implementation", "eager")
    with pytest.raises(InputError, match="not among transformers' attention functions"):
        replies(model, "pai")


@pytest.mark.parametrize(
    ("name", "reason"), [("vdc", "choose from vcd"), ("vcd:x", "strength"), ("pai:-1", "strength")]
)
def test_unknown_decodings_and_strengths_are_refused(name, reason):
    with pytest.raises(InputError, match=reason):
        decoding_of(name)


def test_implausible_tokens_are_never_taken():
    image = torch.tensor([[0.6, 0.35, 0.05]]).log()
    scores = combined(image, [(5.0, torch.tensor([[0.9, 0.09, 0.01]]).log())])
    assert scores.argmax(dim=1).tolist() == [1]
    assert scores[0, 2] == -torch.inf


def test_a_family_is_checked_before_any_work(open_model):
    for name in DECODINGS:
        check_decoding(open_model("llava"), decoding_of(name))
    check_decoding(open_model("mllama"), decoding_of("vcd"))
    with pytest.raises(InputError, match="no tokens of the prompt"):
        check_decoding(open_model("mllama"), decoding_of("pai"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": torch.ones(1, 3)}, "no row per position"),
        ({"s_aux": torch.ones(2)}, "s_aux"),
        ({}, "does not keep all positions"),
    ],
)
def test_attention_with_unknown_terms_is_refused(open_model, change, reason):
    """A mask as flash attention has it, sinks, and a cache that has lost columns of the prompt."""
    model = open_model("llava")
    attention = ImageAttention(model, torch.ones(1, 4, dtype=torch.bool), 0.5)
    module = next(iter(attention.layers))
    query = key = torch.zeros(1, 2, 3, 8)
    arguments = {"attention_mask": None, "scaling": 1.0} | change
    with pytest.raises(InputError, match=reason), attention.applied():
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, key, **arguments)
