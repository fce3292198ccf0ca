"""The sinks of a run, from its settings."""

from pathlib import Path

from megatron_vespo.observability.sinks import JsonlSink, Metrics, MetricSink


def open_metrics(folder: Path, tensorboard: bool) -> Metrics:
    """JSON lines always; TensorBoard's event files in `folder`/tensorboard where asked for."""
    sinks: list[MetricSink] = [JsonlSink(folder)]
    if tensorboard:
        from megatron_vespo.observability.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(folder / "tensorboard"))
    return Metrics(sinks)
