"""An engine may be kept from another run, or be new after a resume: its cache is emptied, its routes are probed."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_vespo.config import WeightSyncConfig
from megatron_vespo.orchestration import steps
from megatron_vespo.orchestration.weight_updater import WeightUpdater
from megatron_vespo.weights.sender import SendTimes


class Engine:
    """Notes what it is told; there are no tensors."""

    url, name, ranks = "http://127.0.0.1:1", "engine", 1

    def __init__(self):
        self.flushed = 0

    async def begin_weight_update(self): ...

    async def end_weight_update(self): ...

    async def flush_cache(self):
        self.flushed += 1

    async def weights_checksum(self):
        return [{}]


ANSWERS = {
    "plan the sync": [[]],
    "gather and send weights": [SendTimes(gather=0, wait=0)],
    "checksum the trainer's weights": [[{}]],
}


class Trainer:
    address = "127.0.0.1"

    async def on_all(self, what, call, seconds=None):
        return ANSWERS[what]

    async def on_first(self, what, call, seconds=None): ...


class Supervisor:
    async def wait(self, what, work, seconds, owner=""):
        return await work


def updater(*, flush_cache: bool) -> WeightUpdater:
    config = WeightSyncConfig(flush_cache=flush_cache)
    return WeightUpdater(Trainer(), Supervisor(), config, engine_dtype="float32", backend="gloo")  # type: ignore[arg-type]


@pytest.mark.parametrize(("flush_cache", "flushed", "oldest"), [(True, 3, None), (False, 1, 4)])
def test_the_cache_is_emptied_at_the_first_sync_in_any_case(flush_cache, flushed, oldest):
    engine = Engine()
    weights = updater(flush_cache=flush_cache)
    for version in (4, 8, 12):
        asyncio.run(weights.sync(version, [engine]))  # type: ignore[list-item]
    assert (engine.flushed, weights.cache_version) == (flushed, oldest)
    asyncio.run(updater(flush_cache=flush_cache).sync(0, [engine]))  # type: ignore[list-item]  # the next run of a grid
    assert engine.flushed == flushed + 1


@pytest.mark.parametrize("engine_has", [None, 0, 8])
def test_a_new_engine_is_probed_once_before_it_samples_also_if_a_resume_brought_it_the_weights(monkeypatch, engine_has):
    probed, sent = [], []

    async def probe(session):
        session.engine_probed = True
        probed.append(session.engines.weight_version)

    async def send(session, receivers, held_since):
        session.engines.weight_version = session.progress.step
        sent.append(session.progress.step)

    monkeypatch.setattr(steps, "probe_engine_routes", probe)
    monkeypatch.setattr(steps, "send_weights", send)
    engines, progress = SimpleNamespace(weight_version=engine_has, waiting=[]), SimpleNamespace(step=8)
    session = SimpleNamespace(engines=engines, progress=progress, engine_probed=False)
    for _ in range(2):
        asyncio.run(steps.sync_weights(session))  # type: ignore[arg-type]
    assert probed == [8]
    assert sent == ([] if engine_has == 8 else [8])
