"""LAPE on text-only models, compared with a plain implementation of the paper that knows nothing of mmray."""

import json
import math
from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.plan import plan_labels
from mmray.features.selectivity.settings import selectivity_settings
from mmray.models.tiny.texts import CONTEXT
from mmray.runs.run import open_run
from tests.support.local_jobs import census_here
from tests.support.text_models import WORDS, corpus

RATE, BAR = 0.1, 0.9
# Where each family's activation function has its output, which is active above zero; and what its neurons feed.
GATES = {
    "gpt2": ("transformer.h.{}.mlp.act", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.mlp.act_fn", "model.layers.{}.mlp.down_proj"),
}


class Plain:
    """The paper's subject: a causal language model, texts one by one, each after one start token."""

    def __init__(self, folder, family):
        self.network = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.gates, self.outputs = ([name.format(layer) for layer in (0, 1)] for name in GATES[family])

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def active(self, text):
        """Return how many of the text's tokens activate each neuron, [layer · neuron], and their number."""
        seen, hooks = [], []
        for name in self.gates:
            module = self.network.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda _, __, out: seen.append((out[0, 1:] > 0).sum(0))))
        tokens = self.tokens(text)
        self.network(torch.tensor([[self.tokenizer.bos_token_id, *tokens]]))
        for hook in hooks:
            hook.remove()
        return torch.cat(seen), len(tokens)

    @torch.no_grad()
    def surprise(self, text, zeroed=()):
        """Return the negative log-likelihood of the text's tokens, in nats, while neurons write nothing."""
        hooks = []
        for layer, name in enumerate(self.outputs):
            units = [unit for at, unit in zeroed if at == layer]

            def silence(_, inputs, units=units):
                changed = inputs[0].clone()
                changed[..., units] = 0
                return (changed,)

            hooks.append(self.network.get_submodule(name).register_forward_pre_hook(silence))
        ids = torch.tensor([[self.tokenizer.bos_token_id, *self.tokens(text)]])
        logs = self.network(ids).logits[0, :-1].log_softmax(-1)
        for hook in hooks:
            hook.remove()
        return float(-logs.gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1


def lape(counts, totals):
    """Return language → neurons by Tang et al. 2024, section 2.2, with entropies, in plain Python."""
    languages = sorted(counts)
    p = [[float(counts[k][i]) / totals[k] for k in languages] for i in range(len(counts[languages[0]]))]
    every = sorted(value for row in p for value in row)
    bar = every[round(BAR * len(every)) - 1]
    entropy = {}
    for i, row in enumerate(p):
        if max(row) > bar:
            parts = [value / sum(row) for value in row]
            entropy[i] = -sum(part * math.log(part) for part in parts if part > 0)
    chosen = sorted(entropy, key=entropy.get)[: round(RATE * len(p))]
    return {k: {i: entropy[i] for i in chosen if p[i][number] > bar} for number, k in enumerate(languages)}


@pytest.fixture(scope="module", params=GATES)
def analysed(request, text_model, tmp_path_factory):
    """Return the family, its run of texts that need no windows, and the analysis with held-out texts."""
    folder = tmp_path_factory.mktemp(request.param)
    data = corpus(folder / "texts.jsonl", texts=12, longest=2, letters=60)
    census_here(text_model(request.param), str(data), folder / "run", nouns="textblob", shard_size=20)
    settings = selectivity_settings(
        {"run": str(folder / "run"), "rate": RATE, "bar": BAR, "permutations": 0, "bootstraps": 0}
        | {"interventions": True, "held_out": 0.4, "local": True}
    )
    return request.param, data, settings, run_selectivity(settings)


def test_the_neurons_are_those_of_the_paper_s_formulas(analysed, text_model):
    family, data, settings, found = analysed
    plain, rows = Plain(text_model(family), family), list(map(json.loads, data.read_text().splitlines()))
    held_out = plan_labels(settings, open_run(settings.run), hold_out=True).held_out
    assert 0 < len(held_out) < len(rows)
    assert max(len(plain.tokens(row["text"])) for row in rows) < CONTEXT - 1
    counts, totals = {}, defaultdict(int)
    for row in rows:
        if row["id"] not in held_out:
            active, tokens = plain.active(row["text"])
            counts[row["language"]] = counts.get(row["language"], 0) + active
            totals[row["language"]] += tokens
    expected = lape(counts, totals)
    width = plain.network.config.intermediate_size if family == "llama" else plain.network.config.n_inner
    ours = defaultdict(dict)
    for row in found.tables["selectivity"].to_pylist():
        ours[row["label"]][row["layer"] * width + row["unit"]] = row["score"]
    assert {label: set(own) for label, own in ours.items()} == {k: set(own) for k, own in expected.items() if own}
    assert sum(map(len, expected.values())) > 4
    for label, own in ours.items():
        assert own == pytest.approx(expected[label])
    counted = {row["label"]: row["tokens"] for row in found.tables["selective_labels"].to_pylist()}
    assert counted == dict(totals)


def test_perplexities_are_those_of_held_out_texts_under_each_mask(analysed, text_model):
    family, data, settings, found = analysed
    plain, rows = Plain(text_model(family), family), list(map(json.loads, data.read_text().splitlines()))
    held_out = plan_labels(settings, open_run(settings.run), hold_out=True).held_out
    chosen = found.tables["selectivity"].to_pylist()
    table = [row for row in found.tables["interventions"].to_pylist() if row["control"] == "selected"]
    assert {row["label"] for row in table} == set(WORDS)
    for row in table:
        texts = [one["text"] for one in rows if one["language"] == row["label"] and one["id"] in held_out]
        zeroed = [(one["layer"], one["unit"]) for one in chosen if one["label"] == row["masked"]]
        assert (row["n"], row["neurons"]) == (len(texts), len(zeroed))
        sums = [torch.tensor([plain.surprise(text, mask) for text in texts]).sum(0) for mask in ((), zeroed)]
        before, after = (float(total / count) for total, count in sums)
        if row["measure"] == "perplexity":
            before, after = math.exp(before), math.exp(after)
        assert row["before"] == pytest.approx(before, rel=1e-4)
        assert row["change"] == pytest.approx(after - before, abs=2e-4 * before)
        assert row["low"] <= row["change"] <= row["high"]
