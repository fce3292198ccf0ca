"""Engines of a real run are killed and stopped: others take their requests over, they come back, nothing is lost."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from test_a_run_from_start_to_report import SHORT, rows

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.errors import RunError
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.training import loop_of
from megatron_vespo.orchestration.training_run import Resume, run_training_loop
from megatron_vespo.rollout import generate
from megatron_vespo.rollout.client import EngineClient

LENGTHS = "rollout.response_length={median: 40, sigma: 0.5}"
"""Long enough for an engine to die in the middle."""
SETTINGS = (*SHORT, LENGTHS, "rollout.engine.hang_timeout_seconds=15", "rollout.engine.max_restarts=5")


def train(folder: Path, *settings: str) -> dict:
    """The summary of a run in this process."""
    config = load_config(TrainConfig, "examples/quickstart.yaml", [f"run_dir={folder}", *SETTINGS, *settings])
    with RunConsole("test", config.algorithm.steps, config.algorithm.sync_every, "plain") as console:
        run_training_loop(config, console, loop_of(config), Resume())
    return json.loads((folder / "summary.json").read_text())


def processes_of(client: EngineClient) -> list[psutil.Process]:
    """SGLang's, the server first and the scheduler among the others."""
    port = client.url.rsplit(":", 1)[1]
    (server,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.cmdline()[1:3] == ["-m", "megatron_vespo.rollout.serve"]
        and process.cmdline()[process.cmdline().index("--port") + 1] == port
        and process.parent().cmdline()[1:3] != ["-m", "megatron_vespo.rollout.serve"]
    ]
    return [server, *server.children(recursive=True)]


class Disturbed:
    """`generate.request`, with a deed done to the engine of the n-th request of a stream while it is on its way."""

    def __init__(self, deeds: dict[tuple[str, int], int]) -> None:
        """`deeds`: the signal by (beginning of the stream's name, n)."""
        self.request, self.deeds = generate.request, deeds
        self.seen: Counter[str] = Counter()
        self.done: list[str] = []

    async def __call__(self, place, generation, responses):
        for (stream, number), deed in self.deeds.items():
            if generation.stream.startswith(stream):
                self.seen[stream] += 1
                if self.seen[stream] == number:
                    client = await place.client()
                    for process in processes_of(client)[:: 1 if deed == signal.SIGSTOP else 999]:
                        os.kill(process.pid, deed)
                    self.done.append(client.name)
        return await self.request(place, generation, responses)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(folder)
    return folder


def test_with_several_engines_of_which_one_dies_and_one_hangs_the_run_is_the_same_bit_for_bit(
    undisturbed, tmp_path, monkeypatch
):
    disturbed = Disturbed({("rollout/0", 3): signal.SIGKILL, ("rollout/1", 2): signal.SIGSTOP})
    monkeypatch.setattr(generate, "request", disturbed)
    folder = tmp_path / "disturbed"
    summary = train(folder, "rollout.engine.count=2")
    assert len(disturbed.done) == 2
    assert summary["engine_restarts"] >= 1  # the run may end before the second is there again
    prints = [[row["response/fingerprint"] for row in rows(run, "rollout")] for run in (undisturbed, folder)]
    assert prints[0] == prints[1]
    ours, theirs = (load_file(run / "checkpoint" / "model.safetensors") for run in (folder, undisturbed))
    assert all(ours[name].equal(theirs[name]) for name in theirs) and len(ours) == len(theirs)


@pytest.mark.slow
def test_an_asynchronous_run_outlives_the_only_engine(tmp_path, monkeypatch):
    disturbed = Disturbed({("rollout", 12): signal.SIGKILL})
    monkeypatch.setattr(generate, "request", disturbed)
    folder = tmp_path / "run"
    summary = train(
        folder,
        "algorithm.asynchronous={sync_every: 2, max_staleness: 5}",
        "checkpoint.save_every=0",
        "rollout.deterministic=false",
    )
    assert disturbed.done == ["engine 0"] and summary["engine_restarts"] >= 1
    assert summary["trajectories_generated"] == summary["trajectories_used"] == 8 * 16
    assert summary["max_staleness_seen"] <= 5 and summary["weight_sync_mismatches"] == 0
    assert summary["dropped_for_age"] == 0


@pytest.mark.slow
def test_without_restarts_the_first_death_ends_the_run_with_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "request", Disturbed({("rollout/0", 2): signal.SIGKILL}))
    with pytest.raises(RunError, match=r"^engine 0: .*killed by SIGKILL"):
        train(tmp_path / "run", "rollout.engine.max_restarts=0")
