import json
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.summary import write_summary
from megatron_vespo.observability.tensorboard_sink import TensorBoardSink


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_back_exactly_and_in_order_of_keys(tmp_path):
    third = 1 / 3
    with Metrics([JsonlSink(tmp_path)], clock=lambda: 12.5) as metrics:
        metrics.write("step", 7, {"loss": third, "batch": np.int64(2), "ess": np.float32(0.1), "when": "x", "ok": True})
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert list(row) == ["kind", "step", "timestamp", "batch", "ess", "loss", "ok", "when"]
    assert row["loss"] == third and row["batch"] == 2 and row["ok"] is True and row["timestamp"] == 12.5
    assert np.float32(row["ess"]) == np.float32(0.1)


def test_each_line_is_on_disk_when_write_returns(tmp_path):
    metrics = Metrics([JsonlSink(tmp_path)])
    metrics.write("step", 1, {"loss": 0.0})
    metrics.write_weights(1, 0, {"log_weight": [0.5]})
    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "weights.jsonl")) == 1
    metrics.close()


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    with Metrics([JsonlSink(tmp_path)]) as metrics:
        metrics.write("step", 1, {"loss": float("nan"), "grad_norm": float("inf"), "ess": 1.0})
        metrics.write_weights(1, 0, {"log_weight": [0.25, float("-inf")]}, ["a/1"])
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["loss"] is None and row["grad_norm"] is None and row["ess"] == 1.0
    assert row["not_finite"] == {"loss": "nan", "grad_norm": "inf"}
    assert lines(tmp_path / "weights.jsonl") == [
        {"step": 1, "staleness": 0, "prompts": ["a/1"], "log_weight": [0.25, None]}
    ]


def test_a_value_that_is_no_scalar_is_refused_by_name(tmp_path):
    with Metrics([JsonlSink(tmp_path)]) as metrics, pytest.raises(TypeError, match="loss"):
        metrics.write("step", 1, {"loss": [1.0]})


def test_a_half_written_last_line_does_not_spoil_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "st')
    with Metrics([JsonlSink(tmp_path)]) as metrics:
        metrics.write("step", 3, {})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["step"] == 3


def test_tensorboard_reads_the_events_back(tmp_path):
    with Metrics([TensorBoardSink(tmp_path)], clock=lambda: 99.0) as metrics:
        for step in (1, 2):
            metrics.write("step", step, {"phi/mean": 0.5 * step, "when": "text"})
        metrics.write_weights(2, 1, {"log_weight": np.linspace(-1, 1, 50)})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value, e.wall_time) for e in events.Scalars("step/phi/mean")] == [(1, 0.5, 99.0), (2, 1.0, 99.0)]
    assert events.Tags()["tensors"] == ["trajectories/log_weight"]
    assert "step/when" not in events.Tags()["scalars"]


def test_observability_loads_neither_torch_nor_ray():
    code = (
        "import sys, tempfile; import megatron_vespo.observability.console, megatron_vespo.observability.report\n"
        "from megatron_vespo.observability.tensorboard_sink import TensorBoardSink\n"
        "TensorBoardSink(tempfile.mkdtemp()).close()\n"
        "print([name for name in ('torch', 'ray', 'tensorflow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_summary_is_sorted_and_readable(tmp_path):
    path = write_summary(tmp_path, {"steps": 4, "accuracy": np.float64(0.5), "mismatch": float("nan"), "after": None})
    text = path.read_text()
    assert json.loads(text) == {
        "accuracy": 0.5,
        "after": None,
        "mismatch": None,
        "not_finite": {"mismatch": "nan"},
        "steps": 4,
    }
    assert text.startswith('{\n  "accuracy": 0.5,\n  "after"')
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
