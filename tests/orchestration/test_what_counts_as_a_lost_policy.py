"""Ranks that died or stand still are lost, whoever says so first; an error that a rank raises is not that."""

import asyncio
import os
import signal
from contextlib import contextmanager

import pytest

from megatron_vespo.errors import RunError
from megatron_vespo.interface import LOOPBACK
from megatron_vespo.orchestration import policy_group
from megatron_vespo.orchestration.policy_group import PolicyGroup, PolicyLost
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.supervision import RunFailed, from_part

RANKS, SECONDS = 2, 60


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="module")
def runtime(loop, tmp_path_factory):
    runtime = Runtime(2 * RANKS, tmp_path_factory.mktemp("runtime"), LOOPBACK)
    loop.run(runtime.__aenter__())
    yield runtime
    loop.run(runtime.__aexit__(None, None, None))


async def start(runtime: Runtime) -> PolicyGroup:
    """Processes without a model."""
    return PolicyGroup(runtime, 0, runtime.place(RANKS, 0, 0))


@pytest.fixture(scope="module")
def whole_group(loop, runtime):
    """One that nothing happens to."""
    return loop.run(start(runtime))


@pytest.fixture
def group(loop, runtime):
    yield loop.run(start(runtime))
    loop.run(runtime.stop_part("policy"))


class Losses(list[PolicyLost]):
    """What would start the policy again, but only notes what it was told."""

    @contextmanager
    def noted(self, group: PolicyGroup):
        async def note(lost: PolicyLost) -> None:
            self.append(lost)

        with group.recovering(note):
            yield


def on_rank(group: PolicyGroup, rank: int, work):
    return group.ranks[rank].__ray_call__.remote(work)


async def hit(group: PolicyGroup, rank: int, number: signal.Signals) -> None:
    """Returns when the rank is dead, or has stopped."""
    pid = await on_rank(group, rank, lambda _: os.getpid())
    os.kill(pid, number)


def raise_connection_error():
    def in_the_rank(_):
        raise ConnectionError("Connection closed by peer")

    return in_the_rank


async def fail_once(group: PolicyGroup, failure) -> tuple[Losses, int]:
    """A unit that fails once. Returns the losses, and how often it was called."""
    losses, calls = Losses(), 0

    async def unit() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await failure()

    with losses.noted(group):
        await group.retried(unit)
    return losses, calls


def test_an_error_that_a_rank_raises_ends_the_run(whole_group, loop):
    async def failure() -> None:
        await from_part("policy rank 0", on_rank(whole_group, 0, raise_connection_error()))

    with pytest.raises(RunFailed, match=r"^policy rank 0: ConnectionError: Connection closed by peer$") as caught:
        loop.run(fail_once(whole_group, failure))
    assert not isinstance(caught.value, PolicyLost)


def test_the_dead_rank_is_named_and_not_its_peer_that_failed_first(group, loop):
    async def failure() -> None:
        await hit(group, 1, signal.SIGKILL)
        await from_part("policy rank 0", on_rank(group, 0, raise_connection_error()))

    losses, calls = loop.run(fail_once(group, failure))
    assert calls == 2
    assert [str(lost) for lost in losses] == ["policy rank 1: its process died (killed, out of memory, or crashed)"]


def test_an_engine_that_lost_the_sender_of_its_weights_is_not_blamed(group, loop):
    async def failure() -> None:
        await hit(group, 0, signal.SIGKILL)
        raise RunError("engine http://127.0.0.1:1/update_weights_from_distributed: not successful")

    losses, calls = loop.run(fail_once(group, failure))
    assert calls == 2 and [lost.part for lost in losses] == ["policy rank 0"]


def test_an_engine_that_failed_by_itself_is(whole_group, loop):
    async def failure() -> None:
        raise RunError("engine: its process died")

    with pytest.raises(RunError, match=r"^engine: its process died$"):
        loop.run(fail_once(whole_group, failure))


def test_a_rank_that_stands_still_is_lost_when_a_deadline_passes(group, loop, monkeypatch):
    monkeypatch.setattr(policy_group, "ANSWER_SECONDS", 2.0)

    async def failure() -> None:
        await hit(group, 0, signal.SIGSTOP)
        await group.on_all("train a step", lambda actor, _: actor.__ray_call__.remote(lambda _: None), 1.0)

    losses, calls = loop.run(fail_once(group, failure))
    assert calls == 2 and [lost.part for lost in losses] == ["policy rank 0"]
    assert "does not answer" in losses[0].cause


def test_ranks_that_answer_but_never_finish_are_lost_too(group, loop):
    async def failure() -> None:
        await group.on_all("train a step", lambda actor, _: actor.hold.remote(), 1.0)

    losses, _ = loop.run(fail_once(group, failure))
    (lost,) = losses
    assert str(lost).startswith(
        "train a step: not finished after 1 s: all processes are alive; waited for policy rank 0"
    )


def test_a_death_ends_other_waits_only_where_nobody_would_start_it_again(group, loop, runtime):
    async def scenario() -> None:
        losses = Losses()
        with losses.noted(group):
            await hit(group, 1, signal.SIGKILL)
            assert await group.lost(RunError("?")) is not None  # it is known by now
            await runtime.supervisor.wait("generate", asyncio.sleep(0.2), SECONDS)
        assert losses == []
        with pytest.raises(RunFailed, match=r"^policy rank 1: its process died"):
            await runtime.supervisor.wait("generate", asyncio.sleep(SECONDS), SECONDS)

    loop.run(scenario())


def test_a_loss_while_the_policy_is_brought_back_is_left_to_who_does_it(whole_group, loop):
    async def scenario() -> None:
        inside: list[RunError] = []

        async def recover(lost: PolicyLost) -> None:
            with pytest.raises(PolicyLost) as caught:
                await whole_group.retried(lose)
            inside.append(caught.value)

        async def lose() -> None:
            raise PolicyLost("policy rank 1", "died")

        async def lose_once() -> None:
            if not inside:
                await lose()

        with whole_group.recovering(recover):
            await whole_group.retried(lose_once)
        assert len(inside) == 1

    loop.run(scenario())
