"""A grid passes over what it has finished, by settings, not by text; and refuses what it would have trained otherwise."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_vespo.config import ConfigError, PlannedRun, TrainConfig, load_config
from megatron_vespo.orchestration.ablation import is_finished


@pytest.fixture
def run(tmp_path) -> PlannedRun:
    config = load_config(TrainConfig, Path("examples/quickstart.yaml"), [f"run_dir={tmp_path}"])
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished"}))
    return PlannedRun("vespo", 1, config)


def written(run: PlannedRun) -> dict:
    return run.config.model_dump(mode="json")


def keep(run: PlannedRun, settings: dict) -> None:
    (Path(run.config.run_dir) / "config.yaml").write_text(yaml.safe_dump(settings))


def test_a_run_of_before_a_setting_was_there_had_its_default(run):
    settings = written(run)
    del settings["rollout"]["max_turns"]
    del settings["cluster"]["start_timeout_seconds"]
    for source in settings["data"]["sources"]:
        del source["environment"]
    keep(run, settings)
    assert is_finished(run)


def test_where_a_run_was_is_no_matter(run):
    settings = written(run)
    settings["run_dir"] = "elsewhere"
    settings["cluster"]["interface"] = "lo"
    settings["observability"]["tensorboard"] = not settings["observability"]["tensorboard"]
    keep(run, settings)
    assert is_finished(run)


def test_what_was_trained_otherwise_is_refused_with_what_differs(run):
    settings = written(run)
    settings["algorithm"]["steps"] = 7
    settings["optimizer"]["a_setting_that_is_gone"] = 1
    keep(run, settings)
    with pytest.raises(ConfigError, match=r"algorithm.steps: 7 -> 120.*a_setting_that_is_gone: 1 -> None"):
        is_finished(run)


def test_an_unfinished_run_is_none(run):
    (Path(run.config.run_dir) / "summary.json").write_text(json.dumps({"status": "failed: ..."}))
    assert not is_finished(run)
