"""The sinks of a run, from its settings."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron_vespo.config import ConfigError, SFTConfig, SinksConfig, TrainConfig
from megatron_vespo.observability.sinks import JsonlSink, Metrics, MetricSink


def check_sinks(sinks: SinksConfig) -> None:
    """Raises ConfigError, before anything is started, where W&B is asked for and is absent or not logged in."""
    if sinks.wandb is None:
        return
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder of this name, as W&B itself makes them, is found without origin
        raise ConfigError("observability.wandb: wandb is not installed: pip install wandb, or leave this section out")
    from megatron_vespo.observability.wandb_sink import check_wandb

    check_wandb(sinks.wandb)


def open_metrics(
    folder: Path,
    config: TrainConfig | SFTConfig,
    tell: Callable[[str], None],
    resumed_after: int | None = None,
) -> Metrics:
    """JSON lines always; TensorBoard's event files in `folder`/tensorboard and a run of W&B where asked for.

    Args:
        tell: prints a line that the user shall see.
        resumed_after: the step that a resumed run goes on after. TensorBoard hides later steps of its earlier parts,
            W&B drops them.

    Raises:
        ConfigError: W&B refuses the run.
    """
    sinks: list[MetricSink] = []
    if config.observability.wandb is not None:
        from megatron_vespo.observability.wandb_sink import WandbSink

        settings = config.model_dump(mode="json")
        sinks.append(WandbSink(config.observability.wandb, folder, settings, resumed_after is not None, tell))
    if config.observability.tensorboard:
        from megatron_vespo.observability.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(folder / "tensorboard", resumed_after))
    return Metrics([JsonlSink(folder), *sinks])
