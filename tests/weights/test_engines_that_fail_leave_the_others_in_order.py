"""An engine is killed or stopped in the middle of a sync: it is named, and the other one gets the weights. One that goes on
can come back."""

import os
import signal
from pathlib import Path

import pytest
from test_every_engine_gets_the_trainers_weights import TRANSPORTS, settings_of
from tiny_engine import running_engine

from megatron_vespo.orchestration.engine_calls import EnginesFailed
from megatron_vespo.rollout import process_tree
from megatron_vespo.rollout.client import EngineClient

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def victim(tiny_qwen3_moe, tmp_path_factory):
    log = tmp_path_factory.mktemp("victim") / "engine.log"
    with running_engine(tiny_qwen3_moe, log, name="victim") as engine:
        yield engine


class Failing(EngineClient):
    """Sends a signal to all processes of its engine before it is told to load its second bucket, or to join a group."""

    pid = 0
    signal = signal.SIGSTOP
    at = "/update_weights_from"
    calls_left = 2

    async def _succeed(self, endpoint, body):
        self.calls_left -= endpoint.startswith(self.at)
        if self.calls_left == 0 and self.pid:
            send_signal(self.pid, self.signal)
            self.pid = 0
        return await super()._succeed(endpoint, body)


def send_signal(pid: int, number: int) -> None:
    for process in process_tree.tree(pid):
        os.kill(process.pid, number)


@pytest.fixture
def survivor(trainer, engine, tiny_qwen3_moe):
    """Afterwards the engine holds its own weights again."""
    yield trainer.client(engine.server, "survivor")
    trainer.load(tiny_qwen3_moe)
    updater = trainer.updater()
    trainer.run(updater.sync(0, [trainer.client(engine.server, "survivor")]))
    trainer.run(updater.disconnect())


def fail(trainer, updater, victim, survivor, number: int) -> EnginesFailed:
    failing = trainer.client(victim.server, "victim", kind=Failing)
    failing.pid, failing.signal = victim.server.pid, number
    with pytest.raises(EnginesFailed) as failure:
        trainer.run(updater.sync(1, [failing, survivor]))
    return failure.value


@pytest.mark.parametrize(
    "transport", [TRANSPORTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TRANSPORTS[1:])]
)
def test_an_engine_that_is_stopped(trainer, victim, survivor, other_weights, tmp_path, transport):
    trainer.load(other_weights)
    updater = trainer.updater(**settings_of(transport, tmp_path), timeout_seconds=25.0)
    failure = fail(trainer, updater, victim, survivor, signal.SIGSTOP)
    try:
        assert list(failure.engines) == ["victim"] and "did not answer within" in failure.engines["victim"]
        assert trainer.run(updater.sync(1, [survivor])).verified
        assert trainer.differences(survivor, other_weights) == []
    finally:
        send_signal(victim.server.pid, signal.SIGCONT)
    back = trainer.client(victim.server, "back")
    assert trainer.run(updater.sync(2, [back, survivor])).verified
    assert trainer.differences(back, other_weights) == []
    trainer.run(updater.disconnect())
    assert not list(Path(tmp_path).glob("weights/*/*"))


def test_an_engine_that_is_stopped_while_it_joins_a_group(trainer, victim, survivor, other_weights):
    trainer.load(other_weights)
    updater = trainer.updater(transport="collective", timeout_seconds=8.0)
    failing = trainer.client(victim.server, "victim", kind=Failing)
    failing.pid, failing.at, failing.calls_left = victim.server.pid, "/init_weights_update_group", 1
    try:
        with pytest.raises(EnginesFailed) as failure:
            trainer.run(updater.sync(1, [failing, survivor]))
        assert list(failure.value.engines) == ["victim"]
        assert trainer.run(updater.sync(1, [survivor])).verified
        assert trainer.differences(survivor, other_weights) == []
    finally:
        send_signal(victim.server.pid, signal.SIGCONT)
    trainer.run(updater.disconnect())


def test_an_engine_that_is_killed(trainer, victim, survivor, other_weights):
    trainer.load(other_weights)
    updater = trainer.updater(transport="collective")
    failure = fail(trainer, updater, victim, survivor, signal.SIGKILL)
    assert list(failure.engines) == ["victim"]
    assert trainer.run(updater.sync(1, [survivor])).verified
    assert trainer.differences(survivor, other_weights) == []
    with pytest.raises(EnginesFailed, match=r"^victim: "):
        trainer.run(updater.sync(2, [survivor, trainer.client(victim.server, "victim")]))
    trainer.run(updater.sync(2, [survivor]))
    assert trainer.run(survivor.weight_version()) == "2"
    trainer.run(updater.disconnect())
