"""Metrics as TensorBoard event files."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - generated when imported
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_vespo.observability.sinks import Row, charted


class TensorBoardSink:
    """Event files for `tensorboard --logdir`, by TensorBoard's own writer: torch stays out of the driver.

    Numbers of a row become scalars at its step (`charted`). Vectors become histograms.
    """

    def __init__(self, folder: str | Path, resumed_after: int | None = None):
        self.writer = EventFileWriter(str(folder))
        if resumed_after is not None:
            start = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=resumed_after + 1, session_log=start))

    def write(self, row: Row) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in charted(row).items()]
        self.writer.add_event(Event(wall_time=row["timestamp"], step=row["step"], summary=Summary(value=values)))
        self.writer.flush()

    def write_weights(
        self, step: int, staleness: int, arrays: Mapping[str, Sequence[float]], prompts: Sequence[str]
    ) -> None:
        for name, vector in arrays.items():
            finite = [value for value in vector if math.isfinite(value)]
            if finite:
                summary = histogram_pb(f"trajectories/{name}", np.asarray(finite))
                self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def write_routing(self, step: int, arrays: Mapping[str, Sequence[float]]) -> None:
        """The means over layers are among the metrics of the step."""

    def close(self, failure: BaseException | None = None) -> None:
        self.writer.close()
