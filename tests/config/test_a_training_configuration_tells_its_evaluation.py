"""`megatron-vespo eval CHECKPOINT FILE` takes the configuration of a training run, too: its held-out questions, as there."""

import pytest

from megatron_vespo.config import ConfigError, load_tasks

QUICKSTART = "examples/quickstart.yaml"


def test_what_is_asked_and_how_is_that_of_the_run():
    tasks = load_tasks(QUICKSTART, ["evaluation.prompts=7", "cluster.interface=lo"])
    assert tasks.data.sources[0].task == "chain_sum" and tasks.evaluation.exclude[0].size == 20000  # type: ignore[union-attr]
    assert (tasks.evaluation.prompts, tasks.evaluation.samples_per_prompt, tasks.evaluation.seed) == (7, 2, 1_000_003)
    assert (tasks.dtype, tasks.rollout.max_response_tokens, tasks.reward.timeout_seconds) == ("float32", 64, 5)
    assert tasks.cluster.interface == "lo"


def test_a_file_of_tasks_alone_is_read_as_before():
    assert load_tasks("examples/tiny_base.eval.yaml").evaluation.prompts == 400


def test_mistakes_of_a_training_configuration_are_all_said():
    with pytest.raises(ConfigError, match=r"2 mistakes\n  algorithm.stepz: unknown key\n  foo: unknown key"):
        load_tasks(QUICKSTART, ["algorithm.stepz=1", "foo=1"])
