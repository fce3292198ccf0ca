"""One engine: an SGLang server in an actor, and a client of it."""

import asyncio
from pathlib import Path
from typing import Any

import ray

from megatron_vespo.config import DataConfig, RolloutConfig
from megatron_vespo.orchestration.engine_actor import EngineActor
from megatron_vespo.orchestration.hosts import Host
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.supervision import RunFailed, from_part
from megatron_vespo.rollout.client import EngineClient

STOP_SECONDS = 5.0


class Engine:
    def __init__(
        self,
        runtime: Runtime,
        settings: dict[str, Any],
        number: int,
        gpus: int,
        weights_timeout_seconds: float | None,
        host: Host,
    ) -> None:
        """`settings`: arguments of `EngineServer`; name, port and log are those of engine `number`."""
        config = settings["engine"]
        log = Path(settings["log_path"])
        port = None if config.port is None else config.port + number
        self.name = f"engine {number}"
        self.host = host
        self._settings = settings | {
            "engine": config.model_copy(update={"port": port}),
            "log_path": str(log.with_stem(f"{log.stem}_{number}")),
            "scratch_parent": str(host.scratch),
            "parts": str(host.parts),
            "name": self.name,
            "interface": host.interface,
            "token": runtime.token,
        }
        self._weights_timeout_seconds = weights_timeout_seconds
        self._actor = EngineActor.options(  # pyright: ignore[reportAttributeAccessIssue]
            **host.actor_options(gpus)
        ).remote(self._settings)
        self._client: EngineClient | None = None
        self._death: asyncio.Task[RunFailed | None] | None = None

    async def start(self) -> EngineClient:
        """Start the server and return a client of it, once it is healthy.

        Raises:
            RunFailed: it did not start.
        """
        config = self._settings["engine"]
        url = await from_part(self.name, self._actor.start.remote())
        self._death = asyncio.ensure_future(self._hold())
        self._client = EngineClient(
            url,
            name=self.name,
            ranks=config.tensor_parallel,
            token=self._settings["token"],
            timeout_seconds=config.request_timeout_seconds,
            **(
                {}
                if self._weights_timeout_seconds is None
                else {"weights_timeout_seconds": self._weights_timeout_seconds}
            ),
        )
        return self._client

    @property
    def client(self) -> EngineClient:
        if self._client is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._client

    def is_of(self, client: EngineClient) -> bool:
        return client is self._client

    async def death(self) -> RunFailed | None:
        """Returns when it is no more: why, or None where it was stopped on purpose."""
        assert self._death is not None
        return await asyncio.shield(self._death)

    async def first_cause(self, seconds: float) -> RunFailed | None:
        """Why its process ended, if it does within `seconds`."""
        if self._death is None:
            return None
        await asyncio.wait({self._death}, timeout=seconds)
        return self._death.result() if self._death.done() else None

    async def _hold(self) -> RunFailed | None:
        try:
            await from_part(self.name, self._actor.hold.remote())
        except RunFailed as failure:
            return failure
        return None

    async def stop(self) -> None:
        """End all of it, whatever state it is in."""
        if self._client is not None:
            await self._client.close()
        try:
            await asyncio.wait_for(from_part(self.name, self._actor.stop.remote()), STOP_SECONDS)
        except (TimeoutError, RunFailed):
            pass  # the actor hangs or is dead, and the server dies with it
        finally:
            ray.kill(self._actor)
            if self._death is not None:
                self._death.cancel()


def engine_settings(
    model_path: str,
    model_dtype: str,
    data: DataConfig,
    rollout: RolloutConfig,
    seed: int,
    logs: Path,
    *,
    return_routed_experts: bool = False,
) -> dict[str, Any]:
    """Arguments of `EngineServer` for a run. Of several, each gets a port and a log of its own."""
    return {
        "model_path": model_path,
        "model_dtype": model_dtype,
        "engine": rollout.engine,
        "deterministic": rollout.deterministic,
        "seed": seed,
        "log_path": str(logs / "engine.log"),
        "max_sequence_tokens": data.max_prompt_tokens + rollout.max_response_tokens,
        "return_routed_experts": return_routed_experts,
    }
