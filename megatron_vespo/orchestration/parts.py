"""Engine, trainer and graders: started side by side for a run, and kept for a further run that they fit."""

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from megatron_vespo.config import ConfigError, TrainConfig
from megatron_vespo.data.sources import numbered_sources
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.sinks import Metrics
from megatron_vespo.orchestration import engines, policy_group
from megatron_vespo.orchestration.cluster import communication_backend, gpus_per_process, interface_of
from megatron_vespo.orchestration.engine import engine_settings
from megatron_vespo.orchestration.engines import Engines
from megatron_vespo.orchestration.places import Places
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.preflight import Prepared
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.supervision import all_of
from megatron_vespo.orchestration.weight_updater import WeightUpdater
from megatron_vespo.rewards.grader import STARTUP_SECONDS
from megatron_vespo.rewards.pool import RewardPool

GRADERS = "graders"


class Parts:
    """Of one runtime; one run uses them at a time.

    A further run gets a new model in the same trainer processes, and the same engine and graders where its settings
    for them are equal. What does not fit is stopped and started anew.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._engines: Engines | None = None
        self._policy: PolicyGroup | None = None
        self._graders: RewardPool | None = None
        self._weights: WeightUpdater | None = None
        self._fits: dict[str, Any] = {}
        """By part: the settings that it was started with."""

    async def session(self, config: TrainConfig, prepared: Prepared, metrics: Metrics, console: RunConsole) -> Session:
        """Everything that a run of `config` needs, with trainer and engine connected."""
        if interface_of(config.cluster) != self._runtime.interface:
            raise ConfigError("cluster.interface: all runs of a grid have one, since they share their parts")
        self._runtime.follow(Path(config.run_dir))
        timed = _Timed(metrics, console)
        if self._weights is not None:
            await self._weights.disconnect()
            self._weights = None
        engine = config.rollout.engine
        gpus = gpus_per_process(config.policy.ranks + engine.count * engine.tensor_parallel)
        places = self._runtime.place(config.policy.ranks, engine.count, gpus * engine.tensor_parallel)
        places.tell = console.event
        await all_of(
            self._fit_engines(config, gpus, places, timed),
            self._fit_policy(config, prepared, gpus, places, timed),
            self._fit_graders(config, timed),
        )
        assert self._engines is not None and self._policy is not None and self._graders is not None
        supervisor = self._runtime.supervisor
        self._engines.tell, self._engines.restarts = console.event, 0
        self._engines.forget_weights()
        self._weights = WeightUpdater(
            self._policy,
            supervisor,
            config.weight_sync,
            engine_dtype=engine.dtype or config.model.dtype,
            backend=communication_backend(gpus),
        )
        return Session(
            config=config,
            engines=self._engines,
            sampler=Sampler(
                self._engines.fleet,
                self._graders,
                prepared.tokenizer,
                prepared.architecture.vocab_size,
                config.rollout,
                supervisor,
                console,
            ),
            policy=self._policy,
            weights=self._weights,
            prompts=prepared.prompts,
            held_out=prepared.held_out,
            metrics=metrics,
            console=console,
            routing_shape=prepared.architecture.routing_shape if config.routing.engine_records else None,
        )

    async def _fit_engines(self, config: TrainConfig, gpus: int, places: Places, timed: "_Timed") -> None:
        settings = engine_settings(
            config.model.path,
            config.model.dtype,
            config.data,
            config.rollout,
            config.seed,
            self._runtime.logs,
            return_routed_experts=config.routing.engine_records,
        )
        # The server's own seed is for sampling without seeds, which nothing can repeat anyway.
        needed = {name: value for name, value in settings.items() if name != "seed"}
        if await self._keep(engines.PART, (needed, config.weight_sync.timeout_seconds, gpus, places.engines)):
            return
        ranks = config.rollout.engine.tensor_parallel
        self._engines = Engines(self._runtime, settings, gpus * ranks, config.weight_sync.timeout_seconds, places)
        await timed("engine", self._engines.start())

    async def _fit_policy(
        self, config: TrainConfig, prepared: Prepared, gpus: int, places: Places, timed: "_Timed"
    ) -> None:
        if not await self._keep(policy_group.PART, (gpus, places.ranks)):
            self._policy = PolicyGroup(self._runtime, gpus, places)
        assert self._policy is not None
        temperature = config.rollout.sampling.temperature
        building = self._policy.build(config, prepared.architecture, config.algorithm.steps, temperature)
        await timed("policy", building)

    async def _fit_graders(self, config: TrainConfig, timed: "_Timed") -> None:
        sources = config.evaluation.sources
        if await self._keep(GRADERS, (config.reward, numbered_sources(config.data, sources))):
            return
        self._graders = graders = RewardPool(
            config.reward, config.data, sources, self._runtime.logs / "graders.log", self._runtime.parts
        )
        self._runtime.on_stop(GRADERS, lambda: asyncio.to_thread(graders.close))
        # The pool has its own deadline and a better message for it; this one is for what keeps it from answering.
        starting = asyncio.to_thread(graders.start)
        await timed("graders", self._runtime.supervisor.wait("start graders", starting, 2 * STARTUP_SECONDS, GRADERS))

    async def _keep(self, part: str, settings: Any) -> bool:
        """Whether `part` runs with these settings; if it runs with others, it is stopped."""
        if part in self._fits and self._fits[part] == settings:
            return True
        if self._fits.pop(part, None) is not None:
            await self._runtime.stop_part(part)
        self._fits[part] = settings
        return False


class _Timed:
    """Says and records how long a part took to be ready."""

    def __init__(self, metrics: Metrics, console: RunConsole) -> None:
        self._metrics = metrics
        self._console = console

    async def __call__(self, part: str, work: Awaitable) -> None:
        started = time.monotonic()
        await work
        seconds = time.monotonic() - started
        self._console.event(f"{part} ready after {seconds:.1f} s")
        self._metrics.write("phase", 0, {"phase": f"start {part}", "time/seconds": seconds})
