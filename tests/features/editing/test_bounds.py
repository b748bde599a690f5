"""The verdict of an edit: each bound by its own value, and never more than was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.editing.bounds import BOUNDS, verdict

WITHIN = {
    bound.measure: sum(limits) / len(limits)
    for bound in BOUNDS
    if (limits := [limit for limit in (bound.at_least, bound.at_most) if limit is not None])
}
"""By measure, a value that its bound allows: the middle of two limits, or the only one."""


def test_all_within_their_bounds() -> None:
    found = verdict(WITHIN)
    assert found["passed"] is True
    assert found["words"] == (
        "takes; carries over to other images; leaves captions; leaves answers about images; leaves text-only replies; "
        "leaves plain text; leaves the yes-ratio"
    )


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.measure)
def test_a_value_past_a_limit_breaks_that_bound_alone(bound) -> None:
    for limit, step in ((bound.at_least, -0.001), (bound.at_most, 0.001)):
        if limit is not None:
            assert verdict(WITHIN | {bound.measure: limit})["passed"] is True
            found = verdict(WITHIN | {bound.measure: limit + step})
            assert found["passed"] is False
            assert [row["measure"] for row in found["bounds"] if row["passed"] is False] == [bound.measure]
            assert f"{bound.broken} (" in found["words"]
            assert bound.kept not in found["words"].split("; ")


@given(missing=st.sets(st.sampled_from(sorted(WITHIN)), min_size=1))
def test_what_is_not_measured_passes_nothing(missing: set[str]) -> None:
    found = verdict({name: None if name in missing else value for name, value in WITHIN.items()})
    assert found["passed"] is None
    assert {row["measure"] for row in found["bounds"] if row["passed"] is None} == missing
    said, _, unmeasured = found["words"].partition("not measured: ")
    assert unmeasured.split(", ") == [bound.subject for bound in BOUNDS if bound.measure in missing]
    assert all(
        bound.kept not in said for bound in BOUNDS if {b.measure for b in BOUNDS if b.kept == bound.kept} <= missing
    )
    # One that is known to be broken decides, whatever is not known.
    broken = {"reliability": 0.0} | dict.fromkeys(missing - {"reliability"})
    assert verdict(WITHIN | broken)["passed"] is False


def test_the_words_give_figure_and_bound_of_what_is_broken() -> None:
    values = {"text_only_64": 0.62, "text_only_kl": 0.001, "pope_yes_ratio_change": 0.39}
    assert verdict(WITHIN | values)["words"].partition("images; changes")[2] == (
        " text-only replies (0.62 unchanged of up to 64 tokens, bound 0.75); leaves plain text; "
        "moves the yes-ratio (by 0.39, bound -0.03 to 0.03)"
    )
