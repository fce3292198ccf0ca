"""The engine as the loops see it: one SGLang server in an actor, and a client for it."""

import asyncio
from pathlib import Path
from typing import Any

import ray

from megatron_vespo.config import DataConfig, RolloutConfig
from megatron_vespo.orchestration.cluster import actor_options
from megatron_vespo.orchestration.engine_actor import EngineActor
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.supervision import from_part
from megatron_vespo.rollout.client import EngineClient

PART = "engine"
STOP_SECONDS = 5.0


class Engine:
    def __init__(
        self, runtime: Runtime, settings: dict[str, Any], gpus: int, weights_timeout_seconds: float = 600.0
    ) -> None:
        """`settings`: arguments of `EngineServer`."""
        settings = settings | {
            "scratch_parent": str(runtime.scratch),
            "parts": str(runtime.parts),
            "name": PART,
            "interface": runtime.interface,
            "token": runtime.token,
        }
        self._weights_timeout_seconds = weights_timeout_seconds
        self._supervisor = runtime.supervisor
        self._settings = settings
        self._actor = EngineActor.options(  # pyright: ignore[reportAttributeAccessIssue]
            **actor_options(gpus, runtime.interface)
        ).remote(settings)
        self._client: EngineClient | None = None
        runtime.on_stop(PART, self.stop)

    async def start(self) -> EngineClient:
        """Start the server and return a client of it, once it is healthy."""
        timeout = self._settings["engine"].startup_timeout_seconds
        url = await self._supervisor.wait(
            "start the engine", from_part(PART, self._actor.start.remote()), timeout, PART
        )
        self._supervisor.watch(PART, self._actor.hold.remote())
        self._client = EngineClient(
            url,
            token=self._settings["token"],
            timeout_seconds=self._settings["engine"].request_timeout_seconds,
            weights_timeout_seconds=self._weights_timeout_seconds,
        )
        return self._client

    @property
    def client(self) -> EngineClient:
        if self._client is None:
            raise RuntimeError("the engine was not started")
        return self._client

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.close()
        try:
            await asyncio.wait_for(self._actor.stop.remote(), STOP_SECONDS)
        finally:
            ray.kill(self._actor)


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
    """Arguments of `EngineServer` for a run."""
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
