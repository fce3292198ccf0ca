"""Layouts of the trainer's ranks, best first, and why each other one is worse."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import require_fit
from megatron_vespo.config import ConfigError, LayoutConfig, TrainConfig
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.hardware import Hardware
from megatron_vespo.planning.step_time import Work, training_seconds
from megatron_vespo.planning.trainer_memory import stages

TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4, 8)
CONTEXT = (1, 2, 4)
EXPERT = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        peak: bytes of the fullest rank.
        margin: bytes that it leaves.
        parts: of a step's seconds.
    """

    layout: LayoutConfig
    peak: float
    margin: float
    parts: list[Amount]

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def seconds(self) -> float:
        return total(self.parts)

    @property
    def name(self) -> str:
        axes = {name: getattr(self.layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
        return " ".join(f"{name}{size}" for name, size in axes.items() if size > 1) or "data parallel alone"


def evaluate(
    config: TrainConfig, architecture: Architecture, work: Work, gpu: Hardware, gpu_memory: int, gpus_per_node: int
) -> Candidate:
    """The configuration's own layout."""
    found = stages(config, architecture)
    peak = max(stage.peak for stage in found)
    slowest = max((training_seconds(s, work, gpu, gpus_per_node) for s in found), key=total)
    return Candidate(config.policy.layout, peak, gpu_memory - peak, slowest)


def ranked(
    config: TrainConfig, architecture: Architecture, work: Work, gpu: Hardware, gpu_memory: int, gpus_per_node: int
) -> list[Candidate]:
    """All that fit the model and the number of ranks: first those that fit into memory, by time."""
    found = [
        evaluate(candidate, architecture, work, gpu, gpu_memory, gpus_per_node)
        for candidate in _configurations(config, architecture, gpus_per_node)
    ]
    if all(candidate.layout != config.policy.layout for candidate in found):
        found.append(evaluate(config, architecture, work, gpu, gpu_memory, gpus_per_node))
    found = [candidate for candidate in found if candidate.layout.cp == 1 or not _fits_without(candidate, found)]
    return sorted(found, key=lambda c: (not c.fits, c.seconds if c.fits else c.peak))


def _fits_without(candidate: Candidate, found: list[Candidate]) -> bool:
    """Whether the same layout without context parallelism fits as well: then that is only an exchange more."""
    alone = candidate.layout.model_copy(update={"cp": 1})
    return any(other.fits and other.layout == alone and other.seconds <= candidate.seconds for other in found)


def why_worse(candidate: Candidate, best: Candidate) -> str:
    """What costs it most against the best."""
    if not candidate.fits:
        return f"does not fit: {-candidate.margin / 1e9:.1f} GB too much"
    of_best = {part.name: part.value for part in best.parts}
    losses = {part.name: part.value - of_best.get(part.name, 0.0) for part in candidate.parts}
    name, seconds = max(losses.items(), key=lambda item: item[1])
    if candidate is best:
        return "fastest that fits"
    return f"{name} +{seconds:.1f} s" if seconds >= 0.05 else "as fast, within what is estimated"


def _configurations(config: TrainConfig, architecture: Architecture, gpus_per_node: int) -> Iterator[TrainConfig]:
    experts = EXPERT if architecture.is_moe else (1,)
    own = config.policy.layout
    for tp, pp, cp, ep in product(TENSOR, PIPELINE, CONTEXT, experts):
        for etp in sorted({1, tp}) if architecture.is_moe else (1,):
            sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "vpp": own.vpp if pp == own.pp else 1}
            # A tensor-parallel group between nodes is never worth its exchange.
            if tp <= gpus_per_node and _possible(config, architecture, sizes):
                yield _with_layout(config, sizes)


def _with_layout(config: TrainConfig, sizes: dict[str, int]) -> TrainConfig:
    layout = config.policy.layout.model_copy(update=sizes)
    return config.model_copy(update={"policy": config.policy.model_copy(update={"layout": layout})})


def _possible(config: TrainConfig, architecture: Architecture, sizes: dict[str, int]) -> bool:
    candidate = _with_layout(config, sizes)
    if any(candidate.policy.problems()) or any(candidate.own_problems()):
        return False
    try:
        require_fit(architecture, candidate.policy)
    except ConfigError:
        return False
    return True
