"""Two real trainer processes, with the weights of any folder, and clients of engines in one event loop."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from held_weights import compared, weights_in

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.config import TrainConfig, WeightSyncConfig, load_config
from megatron_vespo.interface import LOOPBACK
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.weight_updater import WeightUpdater
from megatron_vespo.rollout.client import EngineClient

T = TypeVar("T")


class Trainer:
    def __init__(self, loop: asyncio.AbstractEventLoop, runtime: Runtime, policy: PolicyGroup) -> None:
        self._loop = loop
        self._runtime = runtime
        self.policy = policy
        self._clients: list[EngineClient] = []

    def run(self, work: Awaitable[T]) -> T:
        return self._loop.run_until_complete(work)

    def load(self, folder: Path, layout: str = "{ep: 2}") -> None:
        overrides = [f"model.path={folder}", f"policy.layout={layout}", "evaluation.exclude=[]"]
        config = load_config(TrainConfig, "examples/quickstart.yaml", overrides)
        self.run(self.policy.build(config, read_architecture(folder), total_steps=1, temperature=1.0))

    def updater(self, **settings) -> WeightUpdater:
        """Of buckets so small that the tiny model fills several."""
        config = WeightSyncConfig(**({"bucket_mb": 0.3, "timeout_seconds": 120.0} | settings))
        return WeightUpdater(self.policy, self._runtime.supervisor, config, engine_dtype="float32", backend="gloo")

    def client(self, server, name: str, ranks: int = 1, kind: type[EngineClient] = EngineClient) -> EngineClient:
        client = kind(server.url, name=name, ranks=ranks, token=server.token, timeout_seconds=120)
        self._clients.append(client)
        return client

    def differences(self, client: EngineClient, folder: Path) -> list[str]:
        """Between the engine and the checkpoint in `folder`."""
        return compared(self.run(client.weights_checksum()), weights_in(folder), folder)

    def close_clients(self) -> None:
        for client in self._clients:
            self.run(client.close())


@contextmanager
def running_trainer(folder: Path) -> Iterator[Trainer]:
    loop = asyncio.new_event_loop()
    runtime = Runtime(2, folder, LOOPBACK)
    loop.run_until_complete(runtime.__aenter__())
    trainer = None
    try:

        async def start() -> PolicyGroup:
            return PolicyGroup(runtime, 0, runtime.place(2, 0, 0))

        trainer = Trainer(loop, runtime, loop.run_until_complete(start()))
        yield trainer
    finally:
        if trainer is not None:
            trainer.close_clients()
        loop.run_until_complete(runtime.__aexit__(None, None, None))
        loop.close()
