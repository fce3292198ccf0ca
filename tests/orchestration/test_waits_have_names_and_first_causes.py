"""A wait ends with what was waited for and why, and a part that died is named before what its death caused."""

import asyncio

import pytest

from megatron_vespo.errors import ConfigError
from megatron_vespo.orchestration.supervision import RunFailed, Supervisor, all_of


async def fail_after(seconds: float, error: Exception):
    await asyncio.sleep(seconds)
    raise error


async def never():
    await asyncio.Event().wait()


async def some_turns():
    """Of the event loop: what was set off has happened after them, as far as it waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


def failure_of(scenario) -> str:
    with pytest.raises(RunFailed) as caught:
        asyncio.run(scenario())
    return str(caught.value)


def test_a_result_comes_back():
    async def scenario():
        return await Supervisor().wait("add", all_of(asyncio.sleep(0, 1), asyncio.sleep(0, 2)), seconds=5)

    assert asyncio.run(scenario()) == [1, 2]


def test_an_expired_deadline_names_the_wait():
    assert failure_of(lambda: Supervisor().wait("train a step", never(), seconds=0.05)).startswith(
        "train a step: not finished after"
    )


def test_an_error_of_the_work_names_the_wait():
    async def scenario():
        await Supervisor().wait("send weights", fail_after(0, ValueError("no such tensor")), seconds=5)

    assert failure_of(scenario) == "send weights: ValueError: no such tensor"


def test_a_mistake_of_the_users_stays_one():
    async def scenario():
        await Supervisor().wait("start graders", fail_after(0, ConfigError("no such scorer")), seconds=5)

    with pytest.raises(ConfigError, match=r"^no such scorer$"):
        asyncio.run(scenario())


def test_a_death_ends_a_wait_for_something_else_at_once():
    async def scenario():
        supervisor = Supervisor()
        supervisor.watch("engine", fail_after(0.05, RuntimeError("killed by SIGKILL")))
        await asyncio.wait_for(supervisor.wait("train a step", never(), seconds=60), timeout=5)

    assert failure_of(scenario) == "engine: RuntimeError: killed by SIGKILL"


def test_a_death_is_named_even_when_what_it_caused_is_seen_first():
    async def scenario():
        supervisor = Supervisor()
        supervisor.watch("policy rank 0", never())
        supervisor.watch("policy rank 1", fail_after(0.2, RuntimeError("out of memory")))
        await supervisor.wait("train a step", fail_after(0, ConnectionError("closed by peer")), seconds=60)

    assert failure_of(scenario) == "policy rank 1: RuntimeError: out of memory"


def test_parts_that_are_stopped_on_purpose_fail_nothing():
    async def scenario():
        supervisor = Supervisor()
        supervisor.watch("engine", fail_after(0.05, RuntimeError("stopped")))
        await asyncio.sleep(0)
        supervisor.forget()
        return await supervisor.wait("export", asyncio.sleep(0.1, "done"), seconds=5)

    assert asyncio.run(scenario()) == "done"


def test_parts_that_are_stopped_on_purpose_end_no_wait_that_goes_on():
    async def scenario():
        supervisor, exported = Supervisor(), asyncio.Event()
        supervisor.watch("engine", never())
        supervisor.watch("policy rank 0", never())
        waiting = asyncio.ensure_future(supervisor.wait("export", exported.wait(), seconds=60))
        await some_turns()
        supervisor.forget("engine")
        await some_turns()
        exported.set()
        return await waiting

    assert asyncio.run(scenario()) is True


def test_what_dies_after_another_part_was_stopped_is_still_named():
    async def scenario():
        supervisor, dies = Supervisor(), asyncio.get_running_loop().create_future()
        supervisor.watch("engine", never())
        supervisor.watch("policy rank 0", dies)
        waiting = asyncio.ensure_future(supervisor.wait("train a step", never(), seconds=60))
        await some_turns()
        supervisor.forget("engine")
        await some_turns()
        dies.set_exception(RuntimeError("out of memory"))
        await waiting

    assert failure_of(scenario) == "policy rank 0: RuntimeError: out of memory"


def test_the_deadline_holds_whatever_is_stopped_meanwhile():
    async def scenario():
        supervisor = Supervisor()
        supervisor.watch("engine", never())
        waiting = asyncio.ensure_future(supervisor.wait("train a step", never(), seconds=0.1))
        await some_turns()
        supervisor.forget()
        await waiting

    assert failure_of(scenario).startswith("train a step: not finished after")
