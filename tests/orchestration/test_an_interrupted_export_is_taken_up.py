"""A run that goes on from a step whose export was not written yet begins it before it samples anything."""

import asyncio

import pytest
from small_session import Engine, session_of

from megatron_vespo.orchestration import asynchronous, synchronous


class Policy:
    """Notes what its processes are told."""

    starts = 0

    def __init__(self):
        self.told = []

    async def retried(self, work):
        return await work()

    async def on_all(self, what, call, seconds=None):
        self.told.append(what)


class Sampling(Exception):
    """The next thing that a run does."""


@pytest.mark.parametrize(
    ("loop", "settings"),
    [(synchronous, {}), (asynchronous, {"asynchronous": {"sync_every": 2, "max_staleness": 5}})],
)
@pytest.mark.parametrize(("step", "written", "told"), [(6, False, 1), (6, True, 0), (5, False, 0)])
def test_an_export_that_is_due_and_not_there(monkeypatch, tmp_path, loop, settings, step, written, told):
    async def sample(session):
        raise Sampling

    monkeypatch.setattr(loop, "sync_weights", sample)

    async def main():
        session = session_of(Engine(), **settings)
        session.folder, session.policy, session.progress.step = tmp_path, Policy(), step
        if written:
            (tmp_path / "exports" / f"step_{step:08d}").mkdir(parents=True)
        with pytest.raises(Sampling):
            await loop.train(session)
        return session.policy.told

    assert asyncio.run(main()) == ["copy the model to be exported"] * told
