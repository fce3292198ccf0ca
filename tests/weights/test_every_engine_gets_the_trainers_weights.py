"""Two trainer ranks, an engine of one process and an engine of two, over each transport."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_engine import running_engine

from megatron_vespo.orchestration.engine_calls import EnginesFailed
from megatron_vespo.orchestration.supervision import RunFailed
from megatron_vespo.rollout.client import EngineClient

pytestmark = pytest.mark.engine

TRANSPORTS = ("collective", "shared_memory", "disk")


@pytest.fixture(scope="module")
def shared_engine(tiny_qwen3_moe, tmp_path_factory):
    """Of two ranks."""
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with running_engine(tiny_qwen3_moe, log, ranks=2, name="of two ranks", deterministic=False) as engine:
        yield engine


@pytest.fixture
def clients(trainer, engine, shared_engine, tiny_qwen3_moe):
    """Afterwards the engines hold their own weights again."""
    clients = [trainer.client(engine.server, "of one rank"), trainer.client(shared_engine.server, "of two ranks", 2)]
    yield clients
    trainer.load(tiny_qwen3_moe)
    updater = trainer.updater()
    trainer.run(updater.sync(0, clients))
    trainer.run(updater.disconnect())
    assert trainer.differences(clients[0], tiny_qwen3_moe) == []


def settings_of(transport: str, tmp_path) -> dict:
    disk = {"disk": {"folder": str(tmp_path / "weights")}} if transport == "disk" else {}
    return {"transport": transport} | disk


@pytest.mark.parametrize(
    ("transport", "layout"), [*zip(TRANSPORTS, ("{ep: 2}", "{tp: 2, etp: 2}", "{pp: 2}"), strict=True)]
)
def test_all_ranks_of_all_engines_hold_what_was_sent(trainer, clients, other_weights, tmp_path, transport, layout):
    trainer.load(other_weights, layout)
    updater = trainer.updater(**settings_of(transport, tmp_path), verify_every=2)
    report = trainer.run(updater.sync(4, clients))
    assert (report.transport, report.engines, report.verified) == (transport, 2, True)
    assert report.buckets > 2 and report.bytes == sum(
        t.nbytes for t in load_file(other_weights / "model.safetensors").values()
    )
    for client in clients:
        assert trainer.run(client.weight_version()) == "4"
        assert trainer.differences(client, other_weights) == []
    assert [trainer.run(updater.sync(version, clients)).verified for version in (5, 6)] == [False, True]
    assert trainer.run(clients[1].weight_version()) == "6"
    trainer.run(updater.disconnect())
    assert not list(tmp_path.glob("weights/*"))


def test_memory_is_shared_where_all_are_on_one_host(trainer, clients, other_weights):
    trainer.load(other_weights)
    updater = trainer.updater()
    assert trainer.run(updater.sync(1, clients)).transport == "shared_memory"
    trainer.run(updater.disconnect())


def test_an_engine_that_joins_is_connected_and_verified(trainer, clients, other_weights):
    trainer.load(other_weights)
    updater = trainer.updater(verify_every=100, transport="collective")
    reports = [trainer.run(updater.sync(1, clients[:1])), trainer.run(updater.sync(2, clients))]
    assert [report.verified for report in reports] == [True, True]
    assert not trainer.run(updater.sync(3, clients)).verified
    assert trainer.differences(clients[1], other_weights) == []
    trainer.run(updater.disconnect())


class Corrupted(EngineClient):
    """Of an engine into which a wrong tensor gets at the end of an update."""

    folder = ""

    async def end_weight_update(self) -> None:
        await super().end_weight_update()
        await self.update_weights_from_disk(self.folder)


def test_a_wrong_tensor_is_found_on_the_engine_that_has_it(trainer, engine, shared_engine, clients, tmp_path):
    folder = engine.model_path
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    wrong = load_file(folder / "model.safetensors")[name]
    wrong[3, 50] = torch.nextafter(wrong[3, 50], torch.tensor(9.0))
    save_file({name: wrong}, tmp_path / "model.safetensors")
    trainer.load(folder)
    corrupted = trainer.client(shared_engine.server, "corrupted", 2, Corrupted)
    corrupted.folder = str(tmp_path)
    updater = trainer.updater()
    with pytest.raises(EnginesFailed) as failure:
        trainer.run(updater.sync(1, [clients[0], corrupted]))
    assert list(failure.value.engines) == ["corrupted"] and updater.mismatches == 1
    assert "rank 1: model.layers.1.mlp.experts.w2_weight: differs" in str(failure.value)
    assert trainer.run(updater.sync(1, clients)).verified  # the same process, come back as a new client

    with pytest.raises(EnginesFailed, match=r"w2_weight: differs"):  # others hold what they were sent before
        trainer.run(updater.sync(2, [corrupted]))
    trainer.run(updater.disconnect())
    alone = trainer.updater()
    with pytest.raises(RunFailed, match=r"w2_weight: differs"):
        trainer.run(alone.sync(3, [corrupted]))
    trainer.run(alone.disconnect())
    shutil.rmtree(tmp_path)
