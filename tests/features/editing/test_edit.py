"""Edits are values: applied and undone to the byte, added, written and read, and refused by another model."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmray
from mmray.errors import InputError
from mmray.features.editing.checkpoint import write_checkpoint
from mmray.features.editing.edit import Purpose, WeightEdit, open_edit
from mmray.features.editing.files import CAPTIONS_FILE, EVALUATION_FILE
from mmray.models.loading import digest, load
from tests.support.samples import logits, weights

FAMILIES = ["llava", "qwen3_vl_moe", "blip2_opt", "blip2_t5", "gemma3", "mllama"]
HIDDEN = 32


def edit_of(model, rows, seed=0, std=0.5):
    """Return an edit that adds noise to these (layer, unit) rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.network.get_output_embeddings().weight.shape[1]
    layer, unit = torch.tensor(rows).T
    delta = std * torch.randn(len(rows), hidden, generator=generator)
    purpose = Purpose("swap", "dog", "cat", (("a", "b"),), samples=("s1",))
    return WeightEdit(layer, unit, delta, (purpose,), digest(model.folder), {"x": 1}, {"seconds": 1.0})


@pytest.mark.parametrize("variant", FAMILIES)
def test_weights_are_byte_equal_afterwards(open_model, variant):
    model = open_model(variant)
    before, plain = weights(model), logits(model)
    first, second = edit_of(model, [(0, 1), (1, 4)]), edit_of(model, [(1, 4), (0, 2)], seed=1)
    with first.applied(model):
        once = logits(model)
        with pytest.raises(ZeroDivisionError), second.applied(model):
            assert not torch.equal(logits(model), once)
            raise ZeroDivisionError
        assert torch.equal(logits(model), once)
    assert not torch.equal(once, plain)
    assert weights(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe"])
def test_a_sum_is_both(open_model, variant):
    model = open_model(variant)
    first, second = edit_of(model, [(0, 1), (1, 4)]), edit_of(model, [(1, 4), (0, 2)], seed=1)
    with (first + second).applied(model):
        together = logits(model)
    with first.applied(model), second.applied(model):
        assert torch.allclose(logits(model), together, atol=1e-5)
    assert (first + second).purposes == first.purposes * 2


def test_a_printed_edit_says_what_it_is_for(open_model):
    edit = edit_of(open_model("llava"), [(0, 1), (1, 4)])
    assert repr(edit).startswith("WeightEdit dog → cat: 2 rows of W_out in L0, L1, norm ")


@given(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 30)), min_size=1), st.integers(0, 99))
def test_sums_do_not_depend_on_the_order(rows, seed):
    def edit(number):
        layer, unit = torch.tensor(sorted(rows)).T
        delta = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(seed + number))
        return WeightEdit(layer, unit, delta, (Purpose("swap"),), "m")

    one, other = edit(0) + edit(1), edit(1) + edit(0)
    assert one.neurons == other.neurons
    assert torch.allclose(one.delta, other.delta)
    assert len(one.neurons) == len(rows)


def test_written_and_read(open_model, tmp_path):
    edit = edit_of(open_model("llava"), [(0, 1), (1, 4)])
    edit.save(tmp_path / "edit")
    read = open_edit(tmp_path / "edit")
    assert read.neurons == edit.neurons == ["L0.u1", "L1.u4"]
    assert torch.equal(read.delta, edit.delta)
    assert read.purposes == edit.purposes
    assert (read.model, read.settings, read.facts) == (edit.model, edit.settings, edit.facts)


def test_another_edit_in_its_place_takes_what_was_measured_with_it(open_model, tmp_path):
    edit_of(open_model("llava"), [(0, 1)]).save(tmp_path)
    for name in (EVALUATION_FILE, CAPTIONS_FILE):
        (tmp_path / name).write_bytes(b"of the edit before")
    edit_of(open_model("llava"), [(0, 2)]).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "edit.json", "edit.safetensors"}


def test_another_model_is_refused(open_model):
    edit = edit_of(open_model("llava"), [(0, 1)])
    with pytest.raises(InputError, match="another model"), edit.applied(open_model("gemma3")):
        pass
    with pytest.raises(InputError, match="two models"):
        edit + dataclasses.replace(edit, model="other")


def test_what_is_no_edit_is_refused(open_model, tmp_path):
    with pytest.raises(InputError, match="no edit here"):
        open_edit(tmp_path)
    edit_of(open_model("llava"), [(0, 1)]).save(tmp_path)
    (tmp_path / "edit.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="damaged"):
        open_edit(tmp_path)


def test_rows_of_another_edit_or_with_a_bit_flipped_are_refused(open_model, tmp_path):
    for name, unit in (("one", 1), ("other", 2)):
        edit_of(open_model("llava"), [(0, unit)]).save(tmp_path / name)
    rows = tmp_path / "one" / "edit.safetensors"
    own = rows.read_bytes()
    flipped = bytearray(own)
    flipped[-3] ^= 4
    for damaged in (bytes(flipped), (tmp_path / "other" / "edit.safetensors").read_bytes()):
        rows.write_bytes(damaged)
        with pytest.raises(InputError, match=r"edit\.safetensors: damaged .*; make the edit again$"):
            open_edit(tmp_path / "one")
    rows.write_bytes(own)
    # An edit of an earlier version does not say which rows are its own.
    facts = json.loads((tmp_path / "one" / "edit.json").read_text())
    del facts["rows"]
    (tmp_path / "one" / "edit.json").write_text(json.dumps(facts))
    assert open_edit(tmp_path / "one").neurons == ["L0.u1"]


@pytest.mark.parametrize("variant", ["llava", "blip2_opt"])
def test_a_checkpoint_has_the_edit_in_its_weights(open_model, tmp_path, variant):
    model = open_model(variant)
    edit = edit_of(model, [(0, 1), (1, 4)])
    write_checkpoint(model, edit, tmp_path / "edited")
    with edit.applied(model):
        expected = logits(model)
    edited = mmray.load_model(str(tmp_path / "edited"), "fp32")
    assert torch.equal(logits(edited), expected)
    assert load(str(tmp_path / "edited")).processor is not None
    settings = [(folder / "generation_config.json").read_bytes() for folder in (model.folder, tmp_path / "edited")]
    assert settings[0] == settings[1]
    with pytest.raises(InputError, match="not an empty folder"):
        write_checkpoint(model, edit, tmp_path / "edited")
    with pytest.raises(InputError, match="local folder"):
        write_checkpoint(model, edit, "s3://bucket/edited")
    with pytest.raises(InputError, match="another model"):
        write_checkpoint(open_model("gemma3"), edit, tmp_path / "other")
    assert not (tmp_path / "other").exists()
