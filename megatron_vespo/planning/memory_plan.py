"""The whole plan of a configuration: memory by phase, time by phase, layouts, and the verdict."""

from dataclasses import dataclass

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import require_fit
from megatron_vespo.config import ConfigError, TrainConfig
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.engine_memory import EngineMemory, engine_memory, host_memory
from megatron_vespo.planning.hardware import Hardware
from megatron_vespo.planning.layouts import Candidate, evaluate, ranked
from megatron_vespo.planning.published_models import known_architecture
from megatron_vespo.planning.split import Lengths
from megatron_vespo.planning.step_time import Work, generation_seconds, scoring_seconds, sync_seconds
from megatron_vespo.planning.trainer_memory import TrainerMemory, stages


@dataclass(frozen=True)
class Machines:
    """GPUs and host memory of a run, in bytes.

    Attributes:
        gpus: of all nodes; None: as many as the configuration uses.
        host_memory: of a node.
    """

    gpu: Hardware
    gpu_memory: int
    gpus: int | None
    gpus_per_node: int
    host_memory: int


@dataclass(frozen=True)
class MemoryPlan:
    """Of one configuration.

    Attributes:
        source: where the model's shape is from.
        trainers: the first and the last pipeline stage.
        times: of one optimizer step, by phase.
        layouts: the best first.
    """

    config: TrainConfig
    machines: Machines
    architecture: Architecture
    source: str
    work: Work
    trainers: list[TrainerMemory]
    engine: EngineMemory
    host: list[Amount]
    own: Candidate
    times: dict[str, list[Amount]]
    layouts: list[Candidate]

    @property
    def gpus_used(self) -> int:
        engine = self.config.rollout.engine
        return self.config.policy.ranks + engine.count * engine.tensor_parallel

    @property
    def step_seconds(self) -> float:
        """In turns all phases follow each other; else generation goes on beside the others."""
        seconds = {name: total(amounts) for name, amounts in self.times.items()}
        generation = seconds.pop("generation")
        if self.config.algorithm.asynchronous is None:
            return generation + sum(seconds.values())
        return max(generation, sum(seconds.values()))

    @property
    def problems(self) -> list[str]:
        """Why the configuration does not fit; empty where it does."""
        found, machines = [], self.machines
        if machines.gpus is not None and self.gpus_used > machines.gpus:
            found.append(
                f"policy.ranks and rollout.engine use {self.gpus_used} GPUs, there are {machines.gpus}: lower one of them"
            )
        worst = max(self.trainers, key=lambda trainer: trainer.peak)
        if self.own.margin < 0:
            phase = max(worst.phases, key=lambda name: total(worst.phases[name]))
            largest = max(worst.phases[phase], key=lambda amount: amount.value)
            found.append(
                f"a trainer rank needs {worst.peak / 1e9:.1f} GB in phase {phase}, {-self.own.margin / 1e9:.1f} GB too much; "
                f"most of it is {largest.name} ({largest.value / 1e9:.1f} GB)"
            )
        if self.engine.at_longest < 1:
            found.append(
                f"an engine's KV cache holds {self.engine.cache_tokens:,} tokens, less than one sequence: raise "
                "rollout.engine.tensor_parallel or memory_fraction"
            )
        if self.engine.peak > machines.gpu_memory:
            found.append(
                f"an engine's GPU needs {self.engine.peak / 1e9:.1f} GB: lower rollout.engine.memory_fraction or raise "
                "rollout.engine.tensor_parallel"
            )
        if total(self.host) > machines.host_memory:
            found.append(
                f"host memory: {total(self.host) / 1e9:.0f} GB of a node's {machines.host_memory / 1e9:.0f} GB: fewer "
                "steps under way, or a smaller KV cache where routes are recorded"
            )
        return found


def plan_memory(config: TrainConfig, machines: Machines, lengths: Lengths) -> MemoryPlan:
    """Raises ConfigError where the model is not known, or the layout does not fit it."""
    architecture, source = known_architecture(config.model.path)
    require_fit(architecture, config.policy)
    _require_engine(config, architecture)
    work = Work(config.algorithm.prompts_per_step * config.rollout.group_size, lengths.prompt, lengths.mean_response)
    trainers = stages(config, architecture)
    engine = engine_memory(config, architecture, machines.gpu_memory)
    where = (machines.gpu, machines.gpu_memory, machines.gpus_per_node)
    own = evaluate(config, architecture, work, *where)
    times = {
        "generation": [generation_seconds(config, architecture, work, engine, machines.gpu)],
        "log-probs": scoring_seconds(config, architecture, work, machines.gpu),
        "train": own.parts,
        "weight sync": [_share_of_sync(config, architecture, machines.gpu)],
    }
    return MemoryPlan(
        config,
        machines,
        architecture,
        source,
        work,
        trainers,
        engine,
        host_memory(config, architecture, trainers, engine, machines.gpus_per_node),
        own,
        times,
        ranked(config, architecture, work, *where),
    )


def _share_of_sync(config: TrainConfig, architecture: Architecture, gpu: Hardware) -> Amount:
    whole, steps = sync_seconds(config, architecture, gpu), config.algorithm.sync_every
    return Amount(whole.name, whole.value / steps, f"({whole.formula}) / {steps} steps")


def _require_engine(config: TrainConfig, a: Architecture) -> None:
    tp = config.rollout.engine.tensor_parallel
    sizes = {"num_attention_heads": a.num_attention_heads}
    sizes |= {"moe_intermediate_size": a.moe_ffn_hidden_size} if a.is_moe else {"intermediate_size": a.ffn_hidden_size}
    for name, size in sizes.items():
        if size % tp:
            raise ConfigError(
                f"rollout.engine.tensor_parallel is {tp}, but the model has {name} {size}, which does not divide by it: "
                "choose another number"
            )
