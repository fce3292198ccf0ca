"""Whatever order groups are finished in, and whenever weights go out: nothing is used too late, dropped, or stuck."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.admission import Bound, Ledger


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 8),
    st.integers(0, 10**6),
    st.floats(0.05, 1.0),
)
def test_every_group_is_used_once_and_in_time(groups_per_step, sync_every, slack, seed, eagerness):
    random = Random(seed)
    bound = Bound(sync_every - 1 + slack, groups_per_step)
    ledger, version, steps = Ledger(bound), 0, 40
    version_of, running, complete, used = {}, set(), set(), []
    for _ in range(100_000):
        if ledger.step == steps:
            break
        while ledger.room(version) and random.random() < eagerness:
            number = ledger.start(version)
            version_of[number] = version
            running.add(number)
        if running and random.random() < 0.7:  # any of them, the longest may take for ever
            number = random.choice(sorted(running))
            running.remove(number)
            complete.add(number)
        chosen = ledger.choose(complete)
        if chosen is not None:
            for number in chosen:
                assert 0 <= ledger.step - version_of[number] <= bound.max_staleness
            ledger.use(chosen)
            used += chosen
            complete -= set(chosen)
            if ledger.step % sync_every == 0:
                version = ledger.step
    else:
        pytest.fail("the run is stuck")
    assert len(used) == len(set(used)) == steps * groups_per_step
    assert sorted([*used, *running, *complete]) == list(range(ledger.started))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 4), st.integers(0, 10**6))
def test_groups_that_are_left_out_make_room_for_others(groups_per_step, sync_every, slack, seed):
    random = Random(seed)
    ledger, version, complete = Ledger(Bound(sync_every - 1 + slack, groups_per_step)), 0, set()
    for _ in range(20_000):
        if ledger.step == 30:
            return
        if ledger.room(version):
            number = ledger.start(version)
            if random.random() < 0.4:
                ledger.leave_out(number)
            else:
                complete.add(number)
        chosen = ledger.choose(complete)
        if chosen is not None:
            ledger.use(chosen)
            complete -= set(chosen)
            version = ledger.step - ledger.step % sync_every
    pytest.fail("the run is stuck")


def test_without_slack_it_is_the_synchronous_loop():
    """S = K - 1: a batch of K steps is started at once, and nothing more until weights go out."""
    ledger = Ledger(Bound(max_staleness=3, groups_per_step=2))
    numbers = [ledger.start(0) for _ in range(ledger.room(0))]
    assert len(numbers) == 8 and ledger.room(0) == 0
    for step in range(4):
        assert ledger.choose(numbers[2 * step :]) == numbers[2 * step : 2 * step + 2]
        ledger.use(numbers[2 * step : 2 * step + 2])
        assert ledger.room(0) == 0
    assert ledger.room(4) == 8


def test_one_slow_group_does_not_hold_up_the_others_until_its_deadline():
    ledger = Ledger(Bound(max_staleness=2, groups_per_step=1))
    slow, *others = [ledger.start(0) for _ in range(3)]
    assert ledger.choose(others) == [others[0]]
    ledger.use([others[0]])
    assert ledger.choose([others[1]]) == [others[1]]
    ledger.use([others[1]])
    new = ledger.start(2)
    assert ledger.choose([new]) is None  # step 2 is the slow one's last
    assert ledger.waited_for([new]) == [slow]
    assert ledger.choose([new, slow]) == [slow]


def test_what_breaks_the_bound_is_an_error():
    ledger = Ledger(Bound(max_staleness=1, groups_per_step=1))
    first, second = ledger.start(0), ledger.start(0)
    with pytest.raises(ValueError, match="no group can be started"):
        ledger.start(0)
    ledger.use([second])
    third = ledger.start(1)
    with pytest.raises(ValueError, match="beyond the bound"):
        ledger.use([third])
    ledger.use([first])
    with pytest.raises(KeyError):
        ledger.use([first])
