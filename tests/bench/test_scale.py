"""The simulation of a census: its limits where nothing disturbs it, and what disturbs it."""

from dataclasses import replace

import pytest

from tests.bench.scale import Phases, limits, nearest, requests_per_unit, simulate

CALM = replace(Phases(), life=1e12, driver=0.0, upload=1e18, tables=0.0)


@pytest.mark.parametrize("replicas", [1, 8, 64])
def test_undisturbed_replicas_take_their_share_of_the_work(replicas: int) -> None:
    captions = 1000 * CALM.captions
    done = simulate(captions, replicas, CALM)
    ideal = captions * CALM.forward / replicas
    # The last shards end within one shard of each other; single shards differ by a tenth.
    assert done.shards == 1000 and done.lost == 0
    assert 0.98 * ideal <= done.seconds <= ideal + 1.2 * CALM.captions * CALM.forward


def test_more_replicas_than_shards_are_no_faster() -> None:
    unmerged = replace(CALM, merges=())
    few, many = (simulate(10 * CALM.captions, replicas, unmerged) for replicas in (10, 1000))
    assert few == many


def test_a_slow_driver_is_the_limit() -> None:
    slow = replace(CALM, driver=10.0)
    done = simulate(1000 * CALM.captions, 1000, slow)
    assert done.seconds >= 1000 * slow.driver and done.driver > 0.95
    assert nearest(limits(done, replace(slow, merges=()), 1.0)).startswith("driver")


def test_lost_shards_are_done_again_and_cost_time() -> None:
    mortal = replace(CALM, life=2000.0)
    calm, done = (simulate(2000 * CALM.captions, 8, phases) for phases in (CALM, mortal))
    assert done.lost > 0 and done.seconds > calm.seconds
    # A replica is away for six minutes after each half hour or so.
    assert done.seconds / calm.seconds == pytest.approx(1 + mortal.absence / mortal.life, rel=0.1)


def test_a_unit_s_requests_do_not_grow_with_the_run() -> None:
    few, more = requests_per_unit(20), requests_per_unit(80)
    assert more["write"] == pytest.approx(few["write"], rel=0.1)
    assert more["write"] >= 54  # 53 parts, most of them pieces, and a receipt


def test_a_merge_is_divided_among_replicas_as_far_as_it_has_ranges() -> None:
    one, few, many, more = (simulate(10**6, replicas, CALM) for replicas in (1, 6, 10**3, 10**4))
    assert one.merge == one.alone == few.alone
    # All jobs have six ranges, none has a thousand.
    assert few.merge == pytest.approx(one.merge / 6)
    assert many.merge == more.merge < few.merge
