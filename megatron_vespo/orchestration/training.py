"""Which loop a run's configuration asks for."""

from megatron_vespo.config import TrainConfig
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration import asynchronous, synchronous
from megatron_vespo.orchestration.training_run import Loop, Resume, run_training_loop


def run_training(config: TrainConfig, console: RunConsole, resume: Resume) -> str:
    """`megatron-vespo train`: everything from the checks to the report. Returns what to tell the user at the end."""
    return run_training_loop(config, console, loop_of(config), resume)


def loop_of(config: TrainConfig) -> Loop:
    return synchronous.train if config.algorithm.asynchronous is None else asynchronous.train
