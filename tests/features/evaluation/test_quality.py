"""BLEU is sacrebleu's, summed or whole; the similarity is greedy matching, against a plain loop."""

from importlib import util
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mmray.errors import InputError
from mmray.features.evaluation.quality import bleu_sums, bleu_value, has_bleu
from mmray.models.encoder import Encoder, earth_movers_distance

PAIRS = [
    ("An image of a dog and a cat.", "An image of a dog, a cat and a ball."),
    ("An image of two red balls on a chair.", "A photo of two balls."),
    ("A dog.", "A dog."),
]


def test_summed_parts_are_the_corpus_score() -> None:
    import sacrebleu

    whole = sacrebleu.corpus_bleu([one for one, _ in PAIRS], [[other for _, other in PAIRS]]).score
    sums = np.array([bleu_sums(one, other, "en") for one, other in PAIRS]).sum(axis=0)[None]
    assert bleu_value(sums)[0] == pytest.approx(whole)
    assert bleu_sums("图片里有狗", "图片里有猫", "zh")[0] == 5


def test_without_sacrebleu_it_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_bleu(None)
    assert not has_bleu(False)
    monkeypatch.setattr("mmray.features.evaluation.quality.find_spec", lambda _: None)
    assert util.find_spec("sacrebleu") is not None
    assert not has_bleu(None)
    with pytest.raises(InputError, match=r"pip install 'mmray\[evaluation\]'"):
        has_bleu(True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A BERT of two small layers, with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for pair in PAIRS for text in pair for word in text.lower().replace(".", " .").split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return Encoder(str(folder), torch.device("cpu"))


@torch.no_grad()
def test_similarity_against_a_plain_loop(encoder: Encoder) -> None:
    def plain(text: str) -> list[torch.Tensor]:
        states = encoder.network(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return list(states[1:-1])

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    encoder.vectors([text for pair in PAIRS for text in pair])
    for one, other in PAIRS:
        ours, theirs = plain(one), plain(other)
        precision = sum(max(cosine(a, b) for b in theirs) for a in ours) / len(ours)
        recall = sum(max(cosine(a, b) for a in ours) for b in theirs) / len(theirs)
        wanted = 2 * precision * recall / (precision + recall)
        assert encoder.match(one, other) == pytest.approx(wanted, abs=1e-5)
        assert encoder.match(other, one) == pytest.approx(wanted, abs=1e-5)
        assert encoder.match(one, one) == pytest.approx(1)
    assert encoder.match("", "") == 1
    assert encoder.match("a dog", "") == 0


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (4, 1), (3, 3), (4, 2)])
def test_earth_is_moved_as_cheaply_as_by_the_best_assignment(rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    cost = torch.rand(rows, columns)
    # Where the larger number is a multiple of the smaller, an optimum moves each row as a whole (Birkhoff).
    wide = cost if rows >= columns else cost.T
    each = len(wide) // wide.shape[1]
    places = [column for column in range(wide.shape[1]) for _ in range(each)]
    best = min(
        sum(float(wide[row, column]) for row, column in enumerate(order)) / len(wide) for order in permutations(places)
    )
    assert earth_movers_distance(cost) == pytest.approx(best, abs=1e-6)


@torch.no_grad()
def test_the_same_text_needs_no_moving(encoder: Encoder) -> None:
    for one, other in PAIRS:
        assert encoder.move(one, one) == pytest.approx(1, abs=1e-3)
        assert encoder.move(one, other) == pytest.approx(encoder.move(other, one), abs=1e-4)
        assert (encoder.move(one, other) < 1 - 1e-3) == (one != other)


def test_another_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        Encoder(str(tmp_path), torch.device("cpu"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="not an encoder"):
        Encoder(str(tmp_path), torch.device("cpu"))
