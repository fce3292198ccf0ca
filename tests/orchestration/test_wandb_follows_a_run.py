"""W&B beside real runs, as a user starts them: it has what metrics.jsonl has, and is gone when the run is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml
from test_a_run_from_start_to_report import SHORT
from wandb_records import of_kind, parts, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]
WANDB = ("observability.wandb.project=vespo", "observability.wandb.mode=offline")


def start(*arguments: str, temporary: str | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_vespo", *arguments, *WANDB],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ({"TMPDIR": temporary} if temporary else {}),
    )


def numbers(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {"optimizer_step": line["step"]}
        | {
            f"{line['kind']}/{name}": value
            for name, value in line.items()
            if name not in ("kind", "step", "timestamp", "not_finite") and isinstance(value, (bool, int, float))
        }
        for line in lines
    ]


def scalars(file: Path) -> list[dict]:
    rows_of_file = [{k: v for k, v in row.items() if k == "_step" or not k.startswith("_")} for row in rows(file)]
    return [row for row in rows_of_file if not any(name.startswith("trajectories/") for name in row)]


def test_supervised_training_stopped_by_sigterm(tmp_path):
    demonstrations = [{"prompt": f"What is {a} + 1?", "response": f"<answer>{a + 1}</answer>"} for a in range(8)]
    (tmp_path / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    config = {
        "run_dir": str(tmp_path / "run"),
        "steps": 100_000,
        "model": {"path": "examples/tiny_base", "dtype": "float32"},
        "demonstrations": {"path": str(tmp_path / "demonstrations.jsonl"), "batch_size": 8},
        "policy": {"micro_batch_tokens": 200},
        "observability": {"console": "plain"},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    temporary = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short, because Ray's sockets lie in it
    process = start("sft", str(tmp_path / "sft.yaml"), temporary=temporary)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if " step 3 " in line or "step 3/" in line:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert [member for member in family if member.name() == "wandb-core"], "".join(said)
    process.send_signal(signal.SIGTERM)
    said.append(process.communicate(timeout=300)[0])
    assert process.returncode == 128 + signal.SIGTERM, "".join(said)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    (file,) = parts(tmp_path / "run")
    assert [{k: v for k, v in row.items() if k != "_step"} for row in scalars(file)] == numbers(tmp_path / "run")
    assert of_kind(file, "exit")[0].exit_code == 128 + signal.SIGTERM
    assert not [name for name in os.listdir(temporary) if not name.startswith("torchinductor")]
    shutil.rmtree(temporary)
    assert "wandb sync" in "".join(said) and "wandb:" not in "".join(said)


def test_a_resumed_run_is_one_run(tmp_path):
    run = tmp_path / "run"
    settings = ("train", "examples/quickstart.yaml", f"run_dir={run}", *SHORT, "checkpoint.save_every=4")
    for arguments in (("algorithm.steps=4",), ("algorithm.steps=8", "--resume", "auto")):
        process = start(*settings, *arguments)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-3000:]
    first, second = parts(run)
    ids = [of_kind(file, "run")[0].run_id for file in (first, second)]
    assert ids[0] == ids[1]
    point = of_kind(second, "run")[0].branch_point.value
    whole = [row for row in scalars(first) if row["_step"] <= point] + scalars(second)
    assert all(row["_step"] > point for row in scalars(second))
    assert [{name: value for name, value in row.items() if name != "_step"} for row in whole] == numbers(run)
    histograms = [row["optimizer_step"] for row in rows(first) + rows(second) if "trajectories/phi" in row]
    assert histograms == list(range(1, 9))
