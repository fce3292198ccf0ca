"""Where measurements go: plain JSON lines always, and what else is asked for (`tensorboard_sink`, `wandb_sink`).

A row is a flat mapping with `kind`, `step` (optimizer steps done) and `timestamp` (Unix seconds); docs/metrics.md names
every other key, and in what two runs of one seed differ.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

Row = dict[str, Any]


class MetricSink(Protocol):
    """Takes rows that `Metrics` has already made plain: str, bool, int, float and None, in a fixed order of keys."""

    def write(self, row: Row) -> None: ...

    def write_weights(
        self, step: int, staleness: int, arrays: Mapping[str, Sequence[float]], prompts: Sequence[str]
    ) -> None: ...

    def write_routing(self, step: int, arrays: Mapping[str, Sequence[float]]) -> None: ...

    def close(self, failure: BaseException | None = None) -> None:
        """`failure`: what ended the run; None: it came to its end."""


class Metrics:
    """What the loop calls: makes each row plain once and hands it to every sink.

    Args:
        sinks: written to in this order.
        clock: Unix seconds, for `timestamp`.
    """

    def __init__(self, sinks: Sequence[MetricSink], clock: Callable[[], float] = time.time):
        self.sinks = list(sinks)
        self.clock = clock

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> Row:
        """Write one row to every sink and return it (for the console).

        Raises:
            TypeError: a value is not a string, number, bool or None, or a 0-dimensional array of one.
        """
        row: Row = {"kind": kind, "step": int(step), "timestamp": round(self.clock(), 3)}
        row.update((name, plain(name, values[name])) for name in sorted(values))
        for sink in self.sinks:
            sink.write(row)
        return row

    def write_weights(self, step: int, staleness: int, arrays: Mapping[str, Any], prompts: Sequence[str] = ()) -> None:
        """Write the per-trajectory values of one optimizer step.

        Args:
            arrays: log_weight, phi, advantage, each a vector [trajectories] in one fixed order.
            prompts: identities of the step's prompts, each once.
        """
        vectors = {name: np.asarray(arrays[name], dtype=np.float64).ravel().tolist() for name in sorted(arrays)}
        for sink in self.sinks:
            sink.write_weights(int(step), int(staleness), vectors, prompts)

    def write_routing(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Write figures of each MoE layer of one optimizer step: vectors [MoE layers], the first layer first."""
        vectors = {name: np.asarray(arrays[name], dtype=np.float64).ravel().tolist() for name in sorted(arrays)}
        for sink in self.sinks:
            sink.write_routing(int(step), vectors)

    def close(self, failure: BaseException | None = None) -> None:
        for sink in self.sinks:
            sink.close(failure)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        self.close(failure)


def charted(row: Row) -> dict[str, float]:
    """What is drawn over steps: a row's numbers as `<kind>/<name>`. Text is left to metrics.jsonl."""
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("step", "timestamp") and isinstance(value, (bool, int, float))
    }


def plain(name: str, value: Any) -> str | bool | int | float | None:
    """A scalar (Python's, NumPy's, or a one-element array or tensor) as a Python scalar of the same value."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"metric '{name}' is a {type(value).__name__}; a row holds strings, numbers, bools and None")


class JsonlSink:
    """Appends rows to run_dir/metrics.jsonl and vectors to run_dir/weights.jsonl, a complete line at a time; where routes
    are recorded, vectors of MoE layers to run_dir/routing.jsonl.

    The files are strict JSON. A number that is not finite is written as null, and the row then has
    `not_finite: {name: "nan" | "inf" | "-inf"}`, so that nothing is lost and every reader can read it.
    Vectors keep six significant digits; a not finite element is null.
    """

    def __init__(self, run_dir: str | Path):
        self.folder = Path(run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = _open_for_whole_lines(self.folder / "metrics.jsonl")
        self.weights = _open_for_whole_lines(self.folder / "weights.jsonl")
        self.routing: TextIO | None = None

    def write(self, row: Row) -> None:
        self.metrics.write(json.dumps(strict_json(row), allow_nan=False) + "\n")
        self.metrics.flush()

    def write_weights(
        self, step: int, staleness: int, arrays: Mapping[str, Sequence[float]], prompts: Sequence[str]
    ) -> None:
        _write_vectors(self.weights, {"step": step, "staleness": staleness, "prompts": list(prompts)}, arrays)

    def write_routing(self, step: int, arrays: Mapping[str, Sequence[float]]) -> None:
        if self.routing is None:
            self.routing = _open_for_whole_lines(self.folder / "routing.jsonl")
        _write_vectors(self.routing, {"step": step}, arrays)

    def close(self, failure: BaseException | None = None) -> None:
        for file in (self.metrics, self.weights, self.routing):
            if file is not None:
                file.close()


def _write_vectors(file: TextIO, row: Row, arrays: Mapping[str, Sequence[float]]) -> None:
    for name, vector in arrays.items():
        row[name] = [float(f"{value:.6g}") if math.isfinite(value) else None for value in vector]
    file.write(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n")
    file.flush()


def strict_json(row: Mapping[str, Any]) -> Row:
    """The row with null for numbers that are not finite (JSON has none), which `not_finite` then names."""
    not_finite = {
        name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    }
    values = {name: None if name in not_finite else value for name, value in row.items()}
    return {**values, "not_finite": not_finite} if not_finite else values


def _open_for_whole_lines(path: Path):
    """Open for appending; a line that a killed run left half-written is ended first, so that the next stays whole."""
    file = path.open("a", encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                file.write("\n")
    return file
