"""An asynchronous run's evaluation lets responses run on where the engines have the trainer's weights already."""

import asyncio
from types import SimpleNamespace

import pytest
from small_session import Engine, session_of

from megatron_vespo.orchestration import asynchronous
from megatron_vespo.orchestration.generator import Generator


@pytest.mark.parametrize(("step", "waiting", "interrupted"), [(0, 0, 0), (0, 1, 0), (2, 0, 1), (2, 1, 1)])
def test_responses_that_run_are_ended_only_to_change_weights(monkeypatch, step, waiting, interrupted):
    """`waiting`: engines that were started again, whose weights `evaluate` brings them beside the others' work."""
    evaluated_under = []

    async def bring(session, held_since):
        session.engines.weight_version = session.progress.step

    async def evaluate(session, when, step):
        evaluated_under.append(session.engines.weight_version)

    monkeypatch.setattr(asynchronous, "sync_weights", bring)
    monkeypatch.setattr(asynchronous, "evaluate", evaluate)

    async def main():
        engine = Engine()
        session = session_of(engine, asynchronous={"sync_every": 2, "max_staleness": 5})
        session.engines.waiting.extend([SimpleNamespace()] * waiting)
        engine.answering.clear()
        generator = Generator(session)
        generator.start()
        while engine.gate.passing < 3:
            await asyncio.sleep(0)
        session.progress.step = step
        await asynchronous.evaluate_held_out(session, generator)
        await generator.stop()
        return engine, session

    engine, session = asyncio.run(main())
    assert evaluated_under == [step]
    assert (engine.aborts > 0) == bool(interrupted) and session.tally.updates_mid_generation == interrupted
