"""wandb's own process talks to a server on this host, or to none."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from wandb_records import parts, rows
from wandb_server import Runs, serving

from megatron_vespo.config import ConfigError, WandbConfig
from megatron_vespo.errors import RunError
from megatron_vespo.observability import wandb_sink
from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.wandb_sink import WandbSink

ONLINE = WandbConfig(project="vespo")
OFFLINE = WandbConfig(project="vespo", mode="offline")


@pytest.fixture(autouse=True)
def logged_in(tmp_path, monkeypatch):
    """To nobody's account."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def open_run(folder: Path, config: WandbConfig = ONLINE, resumed: bool = False, tell=lambda text: None) -> Metrics:
    folder.mkdir(exist_ok=True)
    return Metrics([JsonlSink(folder), WandbSink(config, folder, {"seed": 1}, resumed, tell)])


def take_steps(folder: Path, first: int, last: int, loss: float, **arguments) -> None:
    with open_run(folder, **arguments) as metrics:
        for step in range(first, last + 1):
            metrics.write("step", step, {"loss": loss})
            metrics.write_weights(step, 0, {"phi": [1.0, 2.0]})


def go_back(folder: Path, step: int) -> None:
    """As a resume does: one row a step in each file."""
    for name in ("metrics.jsonl", "weights.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:step]))


def losses(runs: Runs) -> list[tuple[int, float]]:
    (history,) = runs.history.values()
    return [(row["optimizer_step"], row["step/loss"]) for row in history if "step/loss" in row]


RESUMED_AFTER_2 = [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)]


def test_a_resumed_run_has_every_step_once(tmp_path, monkeypatch):
    with serving() as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        take_steps(tmp_path / "mine", 1, 4, 0.5)
        assert losses(runs) == [(step, 0.5) for step in (1, 2, 3, 4)]
        go_back(tmp_path / "mine", 2)
        take_steps(tmp_path / "mine", 3, 5, 0.25, resumed=True)
    assert losses(runs) == RESUMED_AFTER_2
    assert json.loads(runs.upserts[0]["config"])["seed"]["value"] == 1
    assert runs.upserts[0]["displayName"] == "mine" and runs.upserts[0]["commit"] is None
    assert runs.exit_codes == [0, 0]


def test_parts_kept_on_disk_become_one_run_when_they_are_uploaded(tmp_path, monkeypatch):
    take_steps(tmp_path / "mine", 1, 4, 0.5, config=OFFLINE)
    go_back(tmp_path / "mine", 2)
    take_steps(tmp_path / "mine", 3, 5, 0.25, config=OFFLINE, resumed=True)
    with serving() as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "mine" / "wandb")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # where it writes its logs
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(runs) == RESUMED_AFTER_2


def test_a_part_waits_on_disk_for_those_before_it(tmp_path, monkeypatch):
    told: list[str] = []
    take_steps(tmp_path / "mine", 1, 4, 0.5, config=OFFLINE)
    go_back(tmp_path / "mine", 2)
    with serving() as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        take_steps(tmp_path / "mine", 3, 5, 0.25, resumed=True, tell=told.append)
        assert not runs.history
    assert len(parts(tmp_path / "mine")) == 2
    assert any("wandb sync" in text for text in told)


def test_out_of_reach_the_run_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_sink, "START_SECONDS", 2.0)
    told: list[str] = []
    take_steps(tmp_path / "mine", 1, 3, 0.5, tell=told.append)
    (file,) = (tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb")
    assert [row["optimizer_step"] for row in rows(file)] == [1, 1, 2, 2, 3, 3]
    assert any("did not answer" in text for text in told) and any("wandb sync" in text for text in told)


def test_a_run_that_is_refused_does_not_start(tmp_path, monkeypatch):
    before, others = set(threading.enumerate()), psutil.Process().children()
    with serving(status=401) as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        with pytest.raises(ConfigError, match=r"observability\.wandb: .*permission denied"):
            open_run(tmp_path / "mine")
    assert set(threading.enumerate()) == before and psutil.Process().children() == others


def test_a_resumed_run_that_is_refused_goes_on_and_is_kept_on_disk(tmp_path, monkeypatch):
    told: list[str] = []
    with serving() as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        take_steps(tmp_path / "mine", 1, 4, 0.5)
    go_back(tmp_path / "mine", 2)
    with serving(status=401) as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        take_steps(tmp_path / "mine", 3, 5, 0.25, resumed=True, tell=told.append)
    (file,) = (tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb")
    assert [row["optimizer_step"] for row in rows(file)] == [3, 3, 4, 4, 5, 5]
    assert any("permission denied" in text for text in told)


def test_when_it_goes_away_the_run_goes_on_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_sink, "FINISH_SECONDS", 2.0)
    told: list[str] = []
    before, others = set(threading.enumerate()), psutil.Process().children()
    with serving() as (runs, _):
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        metrics = open_run(tmp_path / "mine", tell=told.append)
        metrics.write("step", 1, {"loss": 0.5})
    for step in range(2, 500):
        metrics.write("step", step, {"loss": 0.5})
    metrics.close(RunError("x"))
    assert len((tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()) == 499
    (file,) = parts(tmp_path / "mine")
    assert [row["optimizer_step"] for row in rows(file)] == list(range(1, 500))
    assert any(f"wandb sync --include-online {file.parent}" in text for text in told)
    assert set(threading.enumerate()) == before and psutil.Process().children() == others
