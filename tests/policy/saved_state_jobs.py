"""What ranks of a pool are asked to do with saved training states."""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_vespo.architecture.layout_fit import packing_rules
from megatron_vespo.config import PolicyConfig
from megatron_vespo.packing.steps import pack_step
from megatron_vespo.parity.case import Case
from megatron_vespo.parity.worker import joined
from megatron_vespo.policy.losses import loss_function
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.policy.result import StepResult


@dataclass
class Continued:
    """Steps after a save or a load, and this rank's own tensors at the end."""

    results: list[StepResult]
    parameters: list[Tensor]
    random: float


def steps(trainer: MegatronPolicy, case: Case, policy: PolicyConfig, numbers: range) -> list[StepResult]:
    loss = loss_function(case.objective, trainer.context_parallel_group)
    rules = packing_rules(case.architecture, policy)
    shares = [pack_step(case.steps[number], rules)[trainer.place.share] for number in numbers]
    return [trainer.train_step(share, loss) for share in shares]


def save_and_go_on(
    rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig, folder: Path, saved_after: int
) -> Continued:
    """The files are written while the next steps are trained."""
    with joined(rank, world_size, port, case, policy) as trainer:
        steps(trainer, case, policy, range(saved_after))
        torch.rand(3)  # generators are somewhere in the middle
        saving = trainer.begin_save(folder)
        results = steps(trainer, case, policy, range(saved_after, len(case.steps)))
        saving.finish()
        return _continued(trainer, results)


def load_and_go_on(
    rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig, folder: Path, saved_after: int, again: Path
) -> Continued:
    """What was loaded is saved once more, to `again`, before the next steps are trained."""
    with joined(rank, world_size, port, case, policy) as trainer:
        trainer.load_saved(folder, saved_after)
        saving = trainer.begin_save(again)
        saving.finish()
        return _continued(trainer, steps(trainer, case, policy, range(saved_after, len(case.steps))))


def _continued(trainer: MegatronPolicy, results: list[StepResult]) -> Continued:
    trainer.settle_parameters()
    parameters = [parameter.detach().clone() for chunk in trainer.model for parameter in chunk.parameters()]
    return Continued(results, parameters, float(torch.rand(1)))


def plain_tensors(rank: int, world_size: int, port: int, case: Case, folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved policy, whole, as Megatron's own reader finds it."""
    with joined(rank, world_size, port, case, PolicyConfig(ranks=1)):
        return dist_checkpointing.load_plain_tensors(str(folder / "policy"))


def save_without_room(rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig, folder: Path) -> str:
    """Rank 1 may write no file above 64 KiB; its tensors are more. Returns what `finish` raised."""
    with joined(rank, world_size, port, case, policy) as trainer:
        allowed, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, most))
        try:
            saving = trainer.begin_save(folder)
            while not saving.done():
                time.sleep(0.01)
            saving.finish()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, most))
        return "nothing was raised"
