"""Progress never says more than all, or less than nothing, of what is left."""

import io
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mmray.engine import Progress
from mmray.terminal import progress
from mmray.terminal.progress import duration, follow_progress, rate


@pytest.mark.parametrize("terminal", [False, True])
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6), total=st.integers(1, 9))
def test_no_count_is_beyond_the_total(terminal: bool, counts: list[int], total: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with pytest.MonkeyPatch.context() as patch, follow_progress(console) as follow:
        patch.setattr(progress, "PLAIN_EVERY", 0.0)
        for count in counts:
            follow(Progress(count, total, 0, 0))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for done, of in re.findall(r"(\d+) of (\d+)", said):
        assert int(done) <= int(of)
    assert "-" not in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]|-:--:--", "", said)


def test_a_bar_names_the_phase_and_a_log_repeats_no_line() -> None:
    phases = [("loading the model", 0, ""), ("working", 2, ""), ("working", 4, ""), ("merging", 4, "rows, 3 of 6")]
    said = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with follow_progress(console) as follow:
            for phase, done, step in phases:
                follow(Progress(done, 4, 0, 0, phase, step))
                time.sleep(0.15)  # a bar is drawn ten times per second
        said[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert said[True].index("loading the model") < said[True].index("samples/s")
    assert said[True].index("samples/s") < said[True].index("merging rows, 3 of 6")
    assert said[False].splitlines() == [said[False].strip()]
    assert said[False].startswith("4 of 4 samples")


def test_a_log_says_what_a_long_merge_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    console = Console(file=io.StringIO(), width=100)
    with follow_progress(console) as follow:
        for step in ("", "rows, 3 of 6", "sums, 0 of 2"):
            follow(Progress(4, 4, 0, 0, "merging", step))
    assert console.file.getvalue().splitlines() == ["merging rows, 3 of 6", "merging sums, 0 of 2"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(12.34, "12.3 edits/s"), (1.0, "1.0 edits/s"), (0.05, "3 edits/min"), (0.004, "0.24 edits/min")],
)
def test_a_slow_rate_is_per_minute(per_second, text):
    assert rate(per_second, "edits") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_a_duration_is_in_the_unit_that_reads_best(seconds, text):
    assert duration(seconds) == text
