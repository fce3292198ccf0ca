"""Everything of one training run that lives: started together, handed to the loop, summed up at the end."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vespo.config import TrainConfig
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.sinks import Metrics
from megatron_vespo.orchestration.cluster import communication_backend, gpus_per_process
from megatron_vespo.orchestration.engine import Engine, engine_settings
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.preflight import Prepared
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.orchestration.supervision import all_of
from megatron_vespo.orchestration.weight_updater import WeightUpdater
from megatron_vespo.rewards.grader import STARTUP_SECONDS
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rollout.trajectory import Prompt


@dataclass
class Tally:
    """What the summary needs of the whole run."""

    steps: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0
    mismatch_sum: float = 0.0
    mismatch_tokens: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)

    def add_step(self, trained_tokens: int, equal_version_sums: dict[str, float] | None) -> None:
        """`equal_version_sums`: the step's sums where trainer and engine held the same weights."""
        self.steps += 1
        self.trained_tokens += trained_tokens
        if equal_version_sums is not None:
            self.mismatch_sum += equal_version_sums["abs_difference"]
            self.mismatch_tokens += equal_version_sums["tokens"]

    @property
    def mean_abs_logprob_diff(self) -> float | None:
        """Engine against trainer at equal weight version, per response token, over the run."""
        return self.mismatch_sum / self.mismatch_tokens if self.mismatch_tokens else None


@dataclass
class Session:
    config: TrainConfig
    folder: Path
    sampler: Sampler
    policy: PolicyGroup
    weights: WeightUpdater
    prompts: PromptStream
    held_out: list[Prompt]
    metrics: Metrics
    console: RunConsole
    tally: Tally = field(default_factory=Tally)

    def record(self, kind: str, step: int, values: dict) -> None:
        """Write a row of metrics and show it."""
        self.console.update(self.metrics.write(kind, step, values))

    def evaluation_due(self, batch: int) -> bool:
        """After rollout batch `batch`; the one after the last is the evaluation "after"."""
        every, algorithm = self.config.evaluation.every_batches, self.config.algorithm
        return every > 0 and (batch + 1) % every == 0 and (batch + 1) * algorithm.staleness < algorithm.steps

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoint"

    async def export_checkpoint(self) -> None:
        self.console.phase("exporting the checkpoint")
        await self.policy.on_all(
            "export the checkpoint", lambda actor, _: actor.export.remote(str(self.checkpoint_folder), overwrite=False)
        )


async def start_session(
    runtime: Runtime, config: TrainConfig, prepared: Prepared, folder: Path, metrics: Metrics, console: RunConsole
) -> Session:
    """Start the engine, the trainer and the graders side by side, and connect trainer and engine."""
    console.phase("starting engine, trainer and graders")
    engine_config = config.rollout.engine
    gpus = gpus_per_process(config.policy.ranks + engine_config.tensor_parallel)
    settings = engine_settings(
        config.model.path, config.model.dtype, config.data, config.rollout, config.seed, runtime.logs
    )
    engine = Engine(runtime, settings, gpus * engine_config.tensor_parallel, config.weight_sync.timeout_seconds)
    policy = PolicyGroup(config, prepared.architecture, runtime, gpus)
    grader = RewardPool(config.reward, config.data, config.evaluation.sources, runtime.logs / "graders.log")
    runtime.on_stop("graders", lambda: asyncio.to_thread(grader.close))

    async def timed(part: str, work: Awaitable):
        started = time.monotonic()
        result = await work
        seconds = time.monotonic() - started
        console.event(f"{part} ready after {seconds:.1f} s")
        metrics.write("phase", 0, {"phase": f"start {part}", "time/seconds": seconds})
        return result

    client, _, _ = await all_of(
        timed("engine", engine.start()),
        timed("policy", policy.build(config.algorithm.steps, config.seed, config.rollout.sampling.temperature)),
        # The pool has its own deadline and a better message for it; this one is for what keeps it from answering.
        timed(
            "graders", runtime.supervisor.wait("start graders", asyncio.to_thread(grader.start), 2 * STARTUP_SECONDS)
        ),
    )
    weights = WeightUpdater(
        policy,
        client,
        runtime.supervisor,
        config.weight_sync,
        engine_ranks=engine_config.tensor_parallel,
        engine_dtype=engine_config.dtype or config.model.dtype,
        backend=communication_backend(gpus),
    )
    await timed("weight transport", weights.connect())
    return Session(
        config=config,
        folder=folder,
        sampler=Sampler(
            client,
            grader,
            prepared.tokenizer,
            prepared.architecture.vocab_size,
            config.rollout,
            runtime.supervisor,
            console,
        ),
        policy=policy,
        weights=weights,
        prompts=prepared.prompts,
        held_out=prepared.held_out,
        metrics=metrics,
        console=console,
    )
