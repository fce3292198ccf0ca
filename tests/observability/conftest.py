"""A small run folder, written through the sinks that a run writes through."""

import json
from pathlib import Path

import pytest
import yaml
from small_run import (
    BATCHES,
    CONFIG,
    HOSTILE,
    STALENESS,
    evaluation_row,
    layers_of_step,
    routes_of_rollout,
    routes_of_step,
    run_rows,
    sample,
    weights,
)

from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.summary import write_summary


@pytest.fixture
def unfinished_run(tmp_path: Path) -> Path:
    """Ended by a kill in the middle of its second batch: half a line, no summary, no samples after."""
    folder = tmp_path / "small"
    ticks = iter(range(1_000_000))
    with Metrics([JsonlSink(folder)], clock=lambda: 1e9 + next(ticks)) as metrics:
        for kind, step, values in run_rows(batches=1):
            metrics.write(kind, step, values)
            if kind == "step":
                metrics.write_weights(step, values["staleness"], weights(step))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rollout", "step": 4, "rew')
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "samples_before.json").write_text(json.dumps([sample("2 + 2 =", HOSTILE, 0.0)]))
    return folder


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    return write_finished_run(tmp_path / "small", CONFIG)


@pytest.fixture
def run_with_routes(tmp_path: Path) -> Path:
    return write_finished_run(tmp_path / "routed", {**CONFIG, "routing": {"replay": "R3"}}, routes=True)


def write_finished_run(folder: Path, config: dict, routes: bool = False) -> Path:
    ticks = iter(range(1_000_000))
    with Metrics([JsonlSink(folder)], clock=lambda: 1e9 + next(ticks)) as metrics:
        for kind, step, values in run_rows():
            if routes and kind == "rollout":
                values |= routes_of_rollout(values["batch"])
            if routes and kind == "step":
                values |= routes_of_step(values["mini_batch"])
                metrics.write_routing(step, layers_of_step(values["mini_batch"]))
            metrics.write(kind, step, values)
            if kind == "step":
                metrics.write_weights(step, values["staleness"], weights(step))
        metrics.write("evaluation", STALENESS * BATCHES, evaluation_row("after", 0.75))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "samples_before.json").write_text(json.dumps([sample("2 + 2 =", HOSTILE, 0.0)]))
    (folder / "samples_after.json").write_text(json.dumps([sample("2 + 2 =", "4, surely", 1.0)]))
    write_summary(
        folder, {"eval_accuracy_before": 0.25, "eval_accuracy_after": 0.75, "steps": 12, "wall_seconds": 83.0}
    )
    return folder
