"""Phases of a unit: each second counts once, whatever is within what."""

import time

import pytest

from mmray.engine.clock import phase, timed, timed_phases


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets forward itself."""
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return pass_time


def test_a_phase_within_another_is_not_the_others(clock):
    with timed_phases() as seconds:
        with phase("score"):
            clock(1)
            for _ in range(2):
                with phase("forward"):
                    clock(3)
            clock(2)
        clock(10)
    assert seconds == {"score": 3, "forward": 6}


def test_what_comes_one_by_one_is_timed_without_what_is_done_with_it(clock):
    def slowly():
        for number in range(3):
            clock(2)
            yield number

    with timed_phases() as seconds:
        for _ in timed("read", slowly()):
            clock(5)
    assert seconds == {"read": 6}


def test_an_error_ends_its_phase(clock):
    @phase("decode")
    def fail():
        clock(1)
        raise ValueError

    with timed_phases() as seconds:
        for _ in range(2):
            with pytest.raises(ValueError):
                fail()
        with phase("read"):
            clock(1)
    assert seconds == {"decode": 2, "read": 1}


def test_a_unit_that_was_interrupted_leaves_nothing_to_the_next(clock):
    left = phase("forward")
    left.__enter__()
    with timed_phases() as seconds, phase("read"):
        clock(1)
    left.__exit__(None, None, None)
    assert seconds == {"read": 1}
