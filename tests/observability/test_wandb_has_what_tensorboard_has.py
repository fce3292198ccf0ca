"""The real library, offline; what it wrote is read back from its files. Online: see test_wandb_may_be_out_of_reach."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from small_run import CONFIG, run_rows, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_records import of_kind, parts, rows

from megatron_vespo.config import ConfigError, SinksConfig, WandbConfig
from megatron_vespo.errors import RunError
from megatron_vespo.observability.open_metrics import check_sinks
from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.tensorboard_sink import TensorBoardSink
from megatron_vespo.observability.wandb_sink import WandbSink

OFFLINE = WandbConfig(project="vespo", mode="offline")


def open_run(folder: Path, config: WandbConfig = OFFLINE, resumed: bool = False, tell=lambda text: None) -> Metrics:
    """As `open_metrics` does, with a configuration that need not train."""
    sink = WandbSink(config, folder, CONFIG, resumed, tell)
    return Metrics([JsonlSink(folder), TensorBoardSink(folder / "tensorboard"), sink])


def write_run(folder: Path, config: WandbConfig = OFFLINE) -> Path:
    folder.mkdir()
    with open_run(folder, config) as metrics:
        for kind, step, values in run_rows(batches=2):
            metrics.write(kind, step, values)
            if kind == "step":
                metrics.write_weights(step, values["staleness"], weights(step))
    (file,) = parts(folder)
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wandb") / "mine"
    write_run(folder)
    return folder


def own(row: dict) -> dict:
    """Without what wandb adds."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_every_number_of_every_row_is_there_at_its_step(run):
    (file,) = parts(run)
    found = [own(row) for row in rows(file) if not any(name.startswith("trajectories/") for name in row)]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [
        {"optimizer_step": line["step"]}
        | {
            f"{line['kind']}/{name}": value
            for name, value in line.items()
            if name not in ("kind", "step", "timestamp") and isinstance(value, (bool, int, float))
        }
        for line in lines
    ]
    assert len(wanted) > 10 and found == wanted


def test_tensorboard_has_the_same_names_and_as_many_points(run):
    (file,) = parts(run)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    counts = {name: len(events.Scalars(name)) for name in tags["scalars"]}
    counts |= {name: len(events.Tensors(name)) for name in tags["tensors"]}
    found: dict[str, int] = {}
    for row in rows(file):
        for name in own(row).keys() - {"optimizer_step"}:
            found[name] = found.get(name, 0) + 1
    assert found == counts


def test_histograms_are_those_of_the_finite_values(tmp_path):
    log_weight = np.array([-1.0, 0.5, math.nan, 2.0, math.inf, 0.5])
    with open_run(tmp_path) as metrics:
        metrics.write_weights(7, 0, {"log_weight": log_weight, "phi": np.full(3, math.nan)})
    (row,) = rows(parts(tmp_path)[0])
    assert row["optimizer_step"] == 7 and "trajectories/phi" not in row
    counts, edges = np.histogram([-1.0, 0.5, 2.0, 0.5], bins=64)
    histogram = row["trajectories/log_weight"]
    assert histogram["_type"] == "histogram" and histogram["values"] == counts.tolist()
    assert histogram["bins"] == pytest.approx(edges.tolist())


def test_numbers_that_are_not_finite_stay_what_they_are(tmp_path):
    with open_run(tmp_path) as metrics:
        metrics.write("step", 1, {"loss": math.nan, "grad_norm": math.inf, "ok": True})
    (row,) = rows(parts(tmp_path)[0])
    assert math.isnan(row["step/loss"]) and float(row["step/grad_norm"]) == math.inf and row["step/ok"] == 1


def test_the_axis_is_the_optimizer_step_and_the_configuration_is_whole(run):
    (file,) = parts(run)
    axes = {metric.glob_name: metric.step_metric for metric in of_kind(file, "metric") if metric.glob_name}
    assert axes == {"*": "optimizer_step"}
    (started,) = of_kind(file, "run")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert {name: value for name, value in config.items() if name != "_wandb"} == CONFIG
    assert started.project == "vespo" and started.display_name == "mine"
    assert not started.HasField("git") and not list(run.glob("wandb/*/files/*"))


def test_names_groups_and_tags_are_those_of_the_settings(tmp_path):
    settings = {"project": "p", "entity": "team", "name": "n", "group": "g", "tags": ["a", "b"], "mode": "offline"}
    with open_run(tmp_path, WandbConfig.model_validate(settings)):
        pass
    (started,) = of_kind(parts(tmp_path)[0], "run")
    assert (started.entity, started.display_name, started.run_group, list(started.tags)) == (
        "team",
        "n",
        "g",
        ["a", "b"],
    )


def test_a_resumed_run_is_the_same_one_without_the_steps_that_are_taken_again(tmp_path):
    with open_run(tmp_path) as metrics:
        for step in range(1, 5):
            metrics.write("step", step, {"loss": 0.1 * step})
            metrics.write_weights(step, 0, {"phi": [1.0, 2.0]})
    first = parts(tmp_path)[0]
    for name in ("metrics.jsonl", "weights.jsonl"):  # as a resume from step 2 does
        path = tmp_path / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with open_run(tmp_path, resumed=True) as metrics:
        metrics.write("step", 3, {"loss": 9.0})
    (second,) = set(parts(tmp_path)) - {first}
    before, after = of_kind(first, "run")[0], of_kind(second, "run")[0]
    assert before.run_id == after.run_id
    point = after.branch_point
    assert (point.run, point.metric) == (before.run_id, "_step")
    kept = [row for row in rows(first) if row["_step"] <= point.value]
    assert [row["optimizer_step"] for row in kept] == [1, 1, 2, 2]
    assert [row["_step"] for row in rows(second)] == [point.value + 1]
    assert rows(second)[0]["step/loss"] == 9.0


def test_a_new_run_in_the_folder_is_a_new_one_there(tmp_path):
    for _ in range(2):
        with open_run(tmp_path):
            pass
    ids = {of_kind(file, "run")[0].run_id for file in parts(tmp_path)}
    assert len(ids) == 2


@pytest.mark.parametrize(("failure", "code"), [(None, 0), (RunError("x"), 1), (ValueError("x"), 1)])
def test_it_ends_as_the_run_did_and_leaves_no_process_and_no_thread(tmp_path, failure, code):
    before, others = set(threading.enumerate()), set(psutil.Process().children())
    metrics = open_run(tmp_path)
    (child,) = set(psutil.Process().children()) - others
    metrics.close(failure)
    assert not child.is_running() and set(threading.enumerate()) == before
    (ended,) = of_kind(parts(tmp_path)[0], "exit")
    assert ended.exit_code == code
    assert not {name for name in os.environ if name.startswith("WANDB_")}


def test_a_stopped_run_ends_with_the_exit_code_of_its_signal(tmp_path):
    stopped = RunError("stopped by SIGTERM")
    stopped.exit_code = 143
    open_run(tmp_path).close(stopped)
    assert of_kind(parts(tmp_path)[0], "exit")[0].exit_code == 143


def test_training_goes_on_when_its_process_dies(tmp_path):
    told: list[str] = []
    before, others = set(threading.enumerate()), set(psutil.Process().children())
    with open_run(tmp_path, tell=told.append) as metrics:
        metrics.write("step", 1, {"loss": 0.1})
        (child,) = set(psutil.Process().children()) - others
        child.kill()
        child.wait()
        for step in range(2, 6):
            metrics.write("step", step, {"loss": 0.1})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert any("metrics.jsonl has all of it" in text for text in told)
    assert set(threading.enumerate()) == before


def test_it_dies_with_the_driver(tmp_path):
    code = (
        "import os, psutil\n"
        "from pathlib import Path; from megatron_vespo.config import WandbConfig\n"
        "from megatron_vespo.observability.wandb_sink import WandbSink\n"
        f"sink = WandbSink(WandbConfig(project='p', mode='offline'), Path({str(tmp_path)!r}), {{}}, False, lambda text: None)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert done.returncode == -signal.SIGKILL
    children = [process for pid in done.stdout.split() for process in _there(int(pid))]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert done.stdout.split() and not alive


def _there(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []


def test_it_prints_nothing_and_loads_neither_torch_nor_ray(tmp_path):
    code = (
        "import sys; from pathlib import Path; from megatron_vespo.config import WandbConfig\n"
        "from megatron_vespo.observability.wandb_sink import WandbSink, check_wandb\n"
        "config = WandbConfig(project='p', mode='offline'); check_wandb(config)\n"
        f"sink = WandbSink(config, Path({str(tmp_path)!r}), {{}}, False, lambda text: None)\n"
        "sink.write({'kind': 'step', 'step': 1, 'timestamp': 1.0, 'loss': 1.0}); sink.write_weights(1, 0, {'phi': [1]}, [])\n"
        "sink.close(); sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_without_the_library_it_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"observability\.wandb: wandb is not installed: pip install wandb"):
        check_sinks(SinksConfig(wandb=OFFLINE))
    check_sinks(SinksConfig())


@pytest.mark.parametrize("command", ["train", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_command_without_the_library_ends_with_2_and_makes_no_folder(tmp_path, command):
    sums = {"type": "reasoning_gym", "task": "chain_sum"}
    settings = {
        "train": {"data": {"sources": [sums]}, "algorithm": {"steps": 1, "staleness": 1, "prompts_per_step": 2}},
        "sft": {"steps": 1, "demonstrations": {"path": "none.jsonl"}},
    }[command]
    settings |= {"run_dir": str(tmp_path / "run"), "model": {"path": "examples/tiny_base"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        f"sys.argv = ['megatron-vespo', {command!r}, {str(tmp_path / 'run.yaml')!r}, 'observability.wandb.project=p']\n"
        "from megatron_vespo.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "observability.wandb" in done.stderr and "pip install wandb" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_wandb_calls_wrong_is_a_mistake_in_the_settings():
    for wrong in ({"project": "a/b"}, {"project": "p" * 129}, {"project": "p", "tags": ["t" * 65]}):
        with pytest.raises(ConfigError, match=r"observability\.wandb: "):
            check_sinks(SinksConfig(wandb=WandbConfig.model_validate({**wrong, "mode": "offline"})))


def test_online_somebody_has_to_be_logged_in(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    others = psutil.Process().children()
    with pytest.raises(ConfigError, match="wandb login"):
        check_sinks(SinksConfig(wandb=WandbConfig(project="p")))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    check_sinks(SinksConfig(wandb=WandbConfig(project="p")))
    assert psutil.Process().children() == others
