"""The README of the models lists for every family what the code finds and checks."""

from mmray.neurons.validation import CHECKS
from tests.models.support import NAMES, README, SECTION, table, written
from tests.support.tiny import VARIANTS


def test_the_readme_s_table_of_families_is_what_the_tests_find(open_model):
    assert list(NAMES) == list(VARIANTS)
    text = README.read_text(encoding="utf-8")
    assert SECTION.search(text), "the README has lost the place of its table of families"
    made = table(open_model)
    assert made.count(f"| {len(CHECKS) + 1} of {len(CHECKS) + 1} |") == len(VARIANTS)
    assert written(text, made) == text, "run: python -m tests.models.support"
