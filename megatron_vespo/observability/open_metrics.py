"""The sinks of a run, from its settings."""

from pathlib import Path

from megatron_vespo.observability.sinks import JsonlSink, Metrics, MetricSink


def open_metrics(folder: Path, tensorboard: bool, resumed_after: int | None = None) -> Metrics:
    """JSON lines always; TensorBoard's event files in `folder`/tensorboard where asked for.

    `resumed_after`: the step that a resumed run goes on after; TensorBoard hides what an earlier part wrote beyond it.
    """
    sinks: list[MetricSink] = [JsonlSink(folder)]
    if tensorboard:
        from megatron_vespo.observability.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(folder / "tensorboard", resumed_after))
    return Metrics(sinks)
