"""The gate before an engine: nothing runs inside, nothing is lost, whatever order requests come and end in."""

import asyncio

import pytest

from megatron_vespo.rollout.gate import Gate


class Engine:
    """Requests run until they are ended, or for ever; a request is known to it a little after it was sent."""

    def __init__(self):
        self.known: list[asyncio.Event] = []
        self.aborts = 0

    async def request(self, gate: Gate, seen: list[str], name: str) -> None:
        async with gate.through():
            await asyncio.sleep(0.03)
            done = asyncio.Event()
            self.known.append(done)
            await done.wait()
            self.known.remove(done)
            seen.append(name)

    async def abort_all(self) -> None:
        self.aborts += 1
        for done in self.known:
            done.set()


async def started(gate: Gate, engine: Engine, seen: list[str], count: int) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(engine.request(gate, seen, str(number))) for number in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_what_runs_is_ended_also_what_the_engine_did_not_know_of_yet():
    async def main():
        gate, engine, seen = Gate(), Engine(), []
        tasks = await started(gate, engine, seen, 3)
        assert await gate.close(engine.abort_all) == 3
        assert gate.passing == 0 and len(seen) == 3
        assert engine.aborts > 1
        late = await started(gate, engine, seen, 1)
        await asyncio.sleep(0.05)
        assert not engine.known and gate.passing == 0
        gate.open()
        await asyncio.sleep(0.05)
        assert len(engine.known) == 1
        await engine.abort_all()
        await asyncio.gather(*tasks, *late)
        assert len(seen) == 4

    asyncio.run(main())


def test_without_ending_it_waits():
    async def main():
        gate, engine, seen = Gate(), Engine(), []
        tasks = await started(gate, engine, seen, 2)
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().call_later(0.1, lambda: [done.set() for done in engine.known])
        assert await gate.close(None) == 2
        assert len(seen) == 2 and engine.aborts == 0
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_request_that_fails_has_left():
    async def main():
        gate = Gate()

        async def failing():
            async with gate.through():
                raise RuntimeError("no answer")

        with pytest.raises(RuntimeError):
            await failing()
        assert gate.passing == 0
        assert await gate.close(None) == 0

    asyncio.run(main())
