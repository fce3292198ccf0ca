"""Everything of one training run that lives: handed to the loop, summed up at the end."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_vespo.config import TrainConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.sinks import Metrics
from megatron_vespo.orchestration.engines import Engines
from megatron_vespo.orchestration.interruption import StopRequest
from megatron_vespo.orchestration.journal import StepJournal
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.orchestration.weight_updater import WeightUpdater
from megatron_vespo.rollout.trajectory import Trajectory
from megatron_vespo.routing.routes import RoutingShape


@dataclass
class Tally:
    """What the summary needs of the whole run."""

    steps: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0
    max_staleness_seen: int = 0
    updates_mid_generation: int = 0
    """Weight updates that interrupted responses."""
    trajectories_generated: int = 0
    trajectories_used: int = 0
    trajectories_filtered: int = 0
    """Of groups without variance, where these are left out."""
    trajectories_left: int = 0
    """Complete, and not needed any more, at the run's end."""
    overlap: float = 0.0
    """Share of the loop's wall time in which both sampling and training ran."""
    policy_restarts: int = 0
    mismatch_sum: float = 0.0
    mismatch_tokens: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)

    def add_step(self, trained_tokens: int) -> None:
        self.steps += 1
        self.trained_tokens += trained_tokens

    def add_mismatch(self, equal_version_sums: dict[str, float]) -> None:
        """`equal_version_sums`: where trainer and engine held the same weights."""
        self.mismatch_sum += equal_version_sums["abs_difference"]
        self.mismatch_tokens += equal_version_sums["tokens"]

    @property
    def mean_abs_logprob_diff(self) -> float | None:
        """Engine against trainer at equal weight version, per response token, over the run."""
        return self.mismatch_sum / self.mismatch_tokens if self.mismatch_tokens else None


@dataclass
class Progress:
    """Where the run is."""

    step: int = 0
    """Optimizer steps done."""
    mini_batches: list[list[Trajectory]] = field(default_factory=list)
    """Of the current rollout batch, those that are not yet trained on. Asynchronous: the complete groups."""
    prompts: dict[str, Any] | None = None
    """Asynchronous: where the prompt stream was before the oldest prompt that is still being sampled."""
    drawn: list[str] = field(default_factory=list)
    """Asynchronous: prompts behind that place that are not to be sampled again."""


class Writer(Protocol):
    """Writes the trainer's state of some step while training goes on."""

    async def begin_again(self, step: int) -> None:
        """The trainer's processes are new, and where they were after `step` steps: what was being written of that step
        is begun again."""
        ...


@dataclass
class Session:
    config: TrainConfig
    engines: Engines
    sampler: Sampler
    policy: PolicyGroup
    weights: WeightUpdater
    prompts: PromptStream
    held_out: list[Prompt]
    metrics: Metrics
    console: RunConsole
    tally: Tally = field(default_factory=Tally)
    progress: Progress = field(default_factory=Progress)
    started: float = field(default_factory=time.monotonic)
    routing_shape: RoutingShape | None = None
    """Of the engine's routes; None: they are not recorded."""
    journal: StepJournal | None = None
    """None: a policy that is lost ends the run."""
    writers: list[Writer] = field(default_factory=list)
    engine_probed: bool = False
    """Its routes were compared with the trainer's once."""
    stop: StopRequest = field(default_factory=StopRequest)
    elapsed_before: float = 0.0
    """Seconds of the parts of this run before it was resumed."""

    @property
    def elapsed_seconds(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def record(self, kind: str, step: int, values: dict) -> None:
        """Write a row of metrics and show it."""
        self.console.update(self.metrics.write(kind, step, values))

    def evaluation_due(self) -> bool:
        """After this optimizer step; the one after the last is the evaluation "after"."""
        every, step = self.config.evaluation.every_steps, self.progress.step
        return every > 0 and step % every == 0 and step < self.config.algorithm.steps

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoint"

    async def export_checkpoint(self) -> None:
        self.console.phase("exporting the checkpoint")
        await self.policy.retried(
            lambda: self.policy.on_all(
                "export the checkpoint",
                lambda actor, _: actor.export.remote(str(self.checkpoint_folder), overwrite=True),
            )
        )
