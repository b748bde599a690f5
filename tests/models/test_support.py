"""The README of the models lists for every family and model type what the code finds and checks."""

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmray.neurons.validation import CHECKS
from tests.models.support import NAMES, OTHERS, README, SECTIONS, others_table, table, text_table, type_row, written
from tests.support import text_models
from tests.support.model_types import KINDS
from tests.support.tiny import VARIANTS

ALL = f"| {len(CHECKS) + 1} of {len(CHECKS) + 1} |"
SAMPLE = ("florence2", "gemma4", "glm4v_moe", "idefics", "kosmos-2", "qwen3_5")
"""Types that differ most from one another; the others are checked among the slow tests."""


@pytest.fixture(scope="module")
def readme():
    text = README.read_text(encoding="utf-8")
    for name, place in SECTIONS.items():
        assert place.search(text), f"the README has lost the place of its table of {name}"
    return text


@pytest.mark.slow
def test_the_readme_s_table_of_families_is_what_the_tests_find(open_model, readme):
    assert list(NAMES) == list(VARIANTS)
    made = table(open_model)
    assert made.count(ALL) == len(VARIANTS)
    assert written(readme, {"families": made}) == readme, "run: python -m tests.models.support"


def test_the_readme_s_table_of_text_models_is_what_the_tests_find(open_text_model, readme):
    assert list(text_models.NAMES) == list(text_models.FAMILIES | text_models.PROBED)
    made = text_table(open_text_model)
    assert made.count(f"| {len(CHECKS)} of {len(CHECKS)} |") == len(text_models.NAMES)
    assert written(readme, {"texts": made}) == readme, "run: python -m tests.models.support"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in KINDS]
)
def test_every_other_type_passes_all_checks(name, readme, open_type):
    made = type_row(name, open_type(name))
    assert made.endswith(ALL)
    assert made in SECTIONS["types"].search(readme)[0], "run: python -m tests.models.support"


def test_types_without_a_row_have_a_line():
    assert written(text := README.read_text(encoding="utf-8"), {"others": others_table()}) == text
    # What is of another version of transformers has no line.
    known = {facts.config for facts in VARIANTS.values()} | KINDS.keys()
    assert not known & OTHERS.keys()
    assert len(known & MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()) >= 60
