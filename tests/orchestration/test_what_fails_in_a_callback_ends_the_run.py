"""The asynchronous loop starts groups when others end, in a callback of the event loop: what fails there is told."""

import json

import pytest
from test_a_run_from_start_to_report import SHORT

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.data.sources import Item
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration import asynchronous
from megatron_vespo.orchestration.supervision import RunFailed
from megatron_vespo.orchestration.training_run import Resume, run_training_loop

READABLE = 3
"""Two prompts are drawn before anything is sampled, all others when groups end; a step needs four."""


class Unreadable:
    """A task whose items cannot be read from some number on."""

    name, size = "unreadable", None

    def __init__(self, seed: int) -> None:
        pass

    def item(self, index: int) -> Item:
        if index >= READABLE:
            raise OSError(f"item {index} is on a disk that is gone")
        return Item(f"{index} + 1 =", str(index + 1))


def test_a_prompt_that_cannot_be_read_ends_the_run_with_its_cause(tmp_path):
    folder = tmp_path / "run"
    quickstart = load_config(TrainConfig, "examples/quickstart.yaml")
    config = load_config(
        TrainConfig,
        "examples/quickstart.yaml",
        [
            *(
                f"run_dir={folder}",
                *SHORT,
                "evaluation.prompts=2",
                "evaluation.every_steps=0",
                "checkpoint.save_every=0",
            ),
            *("algorithm.asynchronous={sync_every: 2, max_staleness: 5}", "rollout.concurrent_groups=2"),
        ],
        settings={
            "data.sources": [{"type": "custom", "target": f"{__name__}:Unreadable", "scorer": "exact_match"}],
            "evaluation.sources": [source.model_dump() for source in quickstart.data.sources],
            "evaluation.exclude": [],
        },
    )
    with pytest.raises(RunFailed) as error, RunConsole("test", 8, 2, "plain") as console:
        run_training_loop(config, console, asynchronous.train, Resume())
    cause = f"OSError: item {READABLE} is on a disk that is gone"
    assert str(error.value).startswith("wait for ") and str(error.value).endswith(cause)
    assert cause in json.loads((folder / "summary.json").read_text())["status"]
    assert "in _ended" in (folder / "error.txt").read_text()
