"""A census in plain loops and fp64, one sample at a time: what the real one has to agree with."""

import re
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from mmray.data.samples import Sample
from mmray.models.loading import LoadedModel
from mmray.models.prompting import PROMPTS


@dataclass
class Occurrence:
    """One place where a noun is predicted: its neurons' scores and activations, layer by layer in one row."""

    sample_id: str
    concept: str
    token: int
    position: int
    log_prob: float
    scores: np.ndarray
    activations: np.ndarray


def occurrences(model: LoadedModel, samples: list[Sample], mentions, score: str = "contribution") -> list[Occurrence]:
    """Return every occurrence; `mentions` gives the (concept, first character) pairs of a sample."""
    return [
        found
        for sample in samples
        for concept, start in mentions(sample)
        for found in [_occurrence(model, sample, concept, start, score)]
    ]


def words(nouns: dict[str, str]):
    """Find the words that this table leads to a concept."""
    return lambda sample: [
        (nouns[match[0].lower()], match.start())
        for match in re.finditer(r"\w+", sample.caption)
        if match[0].lower() in nouns
    ]


def _occurrence(model: LoadedModel, sample: Sample, concept: str, start: int, score: str) -> Occurrence:
    network, tokenizer = model.network, model.tokenizer
    question = PROMPTS[sample.language or "en"]
    if getattr(model.processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        question = model.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    blank = "" if question[-1].isspace() else " "
    tokens = tokenizer(blank + sample.caption, add_special_tokens=False).input_ids
    # The token that first spells the noun's first character.
    spelt = [len(tokenizer.decode(tokens[: count + 1]).lstrip()) for count in range(len(tokens))]
    index = next(count for count, length in enumerate(spelt) if length > start)
    picture = Image.open(BytesIO(sample.image)).convert("RGB")
    special = not (tokenizer.bos_token and question.startswith(tokenizer.bos_token))
    if model.parts.encoder_decoder:
        inputs = model.processor(text=question, images=picture, return_tensors="pt")
        begin = network.config.get_text_config().decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[begin, *tokens]])
        position = index
    else:
        text = f"{question}{blank}{sample.caption}"
        inputs = model.processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=special)
        position = inputs["input_ids"].shape[1] - len(tokens) + index - 1
    activations: list[np.ndarray] = []
    gates: list[np.ndarray] = []
    with ExitStack() as stack, torch.no_grad():
        for projection in model.projections:
            module = network.get_submodule(projection.path)
            if projection.experts:
                see = _experts(module, position, activations)
                stack.callback(module.register_forward_hook(see, with_kwargs=True).remove)
                continue
            stack.callback(
                module.register_forward_pre_hook(
                    lambda _, given: activations.append(given[0].reshape(-1, given[0].shape[-1])[position].double())
                ).remove
            )
            if score == "gate":
                mlp = network.get_submodule(projection.gate.rpartition(".")[0])
                hook = mlp.gate_proj.register_forward_hook(
                    lambda *call, mlp=mlp: gates.append(mlp.act_fn(call[2][0, position]).double())
                )
                stack.callback(hook.remove)
        logits = network(**inputs).logits[0, position].double()
    token = tokens[index]
    unembedding = network.get_submodule(model.parts.unembedding).weight[token].double()
    numbers = []
    for layer, projection in enumerate(model.projections):
        module = network.get_submodule(projection.path)
        factor = gates[layer] if score == "gate" else activations[layer]
        for neuron in range(projection.width):
            if projection.experts:
                expert, unit = divmod(neuron, projection.width // projection.experts)
                row = module.down_proj[expert, :, unit].double()
            else:
                row = module.weight[:, neuron].double()
            numbers.append(float(factor[neuron] * (row @ unembedding)))
    return Occurrence(
        sample_id=sample.sample_id,
        concept=concept,
        token=token,
        position=position,
        log_prob=float(logits.log_softmax(0)[token]),
        scores=np.array(numbers),
        activations=torch.cat(activations).numpy(),
    )


def _experts(module, position: int, activations: list):
    def see(_, arguments, named, __):
        names = ("hidden_states", "top_k_index", "top_k_weights")
        state, chosen, weights = (
            {**dict(zip(names, arguments, strict=False)), **named}[name][position].double() for name in names
        )
        found = torch.zeros(module.down_proj.shape[0], module.down_proj.shape[2], dtype=torch.float64)
        for expert, weight in zip(chosen.long().tolist(), weights.tolist(), strict=True):
            gate, up = (module.gate_up_proj[expert].double() @ state).chunk(2)
            found[expert] = torch.nn.functional.silu(gate) * up * weight
        activations.append(found.flatten())

    return see


@dataclass
class Ranked:
    """A concept's numbers of every neuron."""

    n: int
    score: np.ndarray
    std: np.ndarray
    specific: np.ndarray
    selective: np.ndarray
    share: np.ndarray
    activation: np.ndarray


def rankings(found: list[Occurrence], top_k: int) -> dict[str, Ranked]:
    """Return what the definitions of the columns of `rankings` give."""
    by_concept = defaultdict(list)
    for occurrence in found:
        by_concept[occurrence.concept].append(occurrence)
    ranked = {}
    for concept, own in by_concept.items():
        scores = np.array([occurrence.scores for occurrence in own])
        others = [occurrence.scores for occurrence in found if occurrence.concept != concept]
        squares = np.mean(np.square(others), axis=0) if others else np.zeros(scores.shape[1])
        elsewhere = np.mean(others, axis=0) if others else np.zeros(scores.shape[1])
        listed = [set(np.argsort(-row, kind="stable")[:top_k]) for row in scores]
        ranked[concept] = Ranked(
            n=len(own),
            score=scores.mean(0),
            std=scores.std(0),
            specific=scores.mean(0) - np.maximum(0, elsewhere),
            selective=scores.mean(0) - np.sqrt(squares),
            share=np.array([sum(neuron in top for top in listed) / len(own) for neuron in range(scores.shape[1])]),
            activation=np.mean([occurrence.activations for occurrence in own], axis=0),
        )
    return ranked
