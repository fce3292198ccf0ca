"""A grid file becomes runs: every variant with every value and every seed, each a whole configuration."""

from pathlib import Path

import pytest

from megatron_vespo.config import AblationConfig, ConfigError, load_config, plan_runs

RUN = """
run_dir: unused
model: {path: somewhere}
data: {sources: [{type: reasoning_gym, task: chain_sum}]}
algorithm: {steps: 8, prompts_per_step: 2, staleness: 4}
"""
GRID = """
title: Two by two
config: run.yaml
set: {algorithm.steps: 64}
variants:
  vespo: {}
  grpo: {set: {algorithm.objective.kernel: grpo, optimizer.learning_rate: 3.0e-5}}
grid: {algorithm.staleness: [1, 16]}
seeds: [1, 7]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def planned(folder: Path, text: str = GRID, overrides: list[str] | None = None):
    file = folder / "grid.yaml"
    file.write_text(text)
    return plan_runs(load_config(AblationConfig, file), file, folder / "out", overrides)


def test_every_variant_meets_every_value_and_every_seed(folder):
    runs = planned(folder)
    assert [(run.variant, run.seed) for run in runs] == [
        (f"{name}, staleness={staleness}", seed)
        for seed in (1, 7)
        for name in ("vespo", "grpo")
        for staleness in (1, 16)
    ]
    for run in runs:
        assert run.config.seed == run.seed
        assert run.config.algorithm.steps == 64
        assert f"staleness={run.config.algorithm.staleness}" in run.variant
        assert run.config.algorithm.objective.kernel.name == run.variant.split(",")[0]
        assert run.config.optimizer.learning_rate == (3e-5 if run.variant.startswith("grpo") else 1e-6)
    assert len({run.config.run_dir for run in runs}) == 8
    assert runs[0].config.run_dir == str(folder / "out" / "vespo_staleness=1" / "seed_1")


def test_a_variant_may_have_values_of_its_own(folder):
    text = GRID.replace("  vespo: {}", "  vespo: {grid: {algorithm.staleness: [2], rollout.group_size: [4, 16]}}")
    runs = planned(folder, text.replace("seeds: [1, 7]", "seeds: [1]"))
    assert [(run.method, dict(run.point)) for run in runs] == [
        ("vespo", {"algorithm.staleness": "2", "rollout.group_size": "4"}),
        ("vespo", {"algorithm.staleness": "2", "rollout.group_size": "16"}),
        ("grpo", {"algorithm.staleness": "1"}),
        ("grpo", {"algorithm.staleness": "16"}),
    ]
    assert [run.config.rollout.group_size for run in runs] == [4, 16, 8, 8]


def test_a_file_is_laid_over_configurations_and_under_what_the_grid_sets(folder):
    (folder / "big.yaml").write_text("rollout: {group_size: 32}\nalgorithm: {steps: 4, prompts_per_step: 5}\n")
    file = folder / "grid.yaml"
    runs = plan_runs(load_config(AblationConfig, file), file, folder / "out", over=folder / "big.yaml")
    assert {run.config.rollout.group_size for run in runs} == {32}
    assert {run.config.algorithm.prompts_per_step for run in runs} == {5}
    assert {run.config.algorithm.steps for run in runs} == {64}
    with pytest.raises(ConfigError, match=r"small.yaml: no such configuration file"):
        plan_runs(load_config(AblationConfig, file), file, folder / "out", over=folder / "small.yaml")


def test_a_bare_off_is_called_off(folder):
    """YAML reads it as false."""
    runs = planned(folder, GRID.replace("algorithm.staleness: [1, 16]", "routing.replay: [off, R3]"))
    assert [run.variant for run in runs[:2]] == ["vespo, replay=off", "vespo, replay=R3"]
    assert [run.config.routing.replay for run in runs[:2]] == ["off", "R3"]
    assert runs[0].config.run_dir == str(folder / "out" / "vespo_replay=off" / "seed_1")


def test_the_command_line_has_the_last_word(folder):
    assert {run.config.algorithm.steps for run in planned(folder, overrides=["algorithm.steps=32"])} == {32}


def test_one_variants_settings_stay_out_of_the_next(folder):
    text = GRID.replace("set: {algorithm.steps: 64}", "set: {algorithm.steps: 64, optimizer: {learning_rate: 1.0e-6}}")
    text = text.replace("  vespo: {}\n", "  first: {set: {optimizer.learning_rate: 5.0e-5}}\n  vespo: {}\n")
    rates = {run.variant.split(",")[0]: run.config.optimizer.learning_rate for run in planned(folder, text)}
    assert rates == {"first": 5e-5, "vespo": 1e-6, "grpo": 3e-5}


@pytest.mark.parametrize("override", ["seed=5", "run_dir=x", "overwrite=false"])
def test_what_the_grid_decides_is_not_overridden(folder, override):
    with pytest.raises(ConfigError, match="decided by the grid"):
        planned(folder, overrides=[override])


def test_a_variant_may_start_from_a_file_of_its_own(folder):
    (folder / "other.yaml").write_text("base: run.yaml\noptimizer: {learning_rate: 0.5}\n")
    runs = planned(folder, GRID.replace("vespo: {}", "vespo: {config: other.yaml}"))
    assert {run.config.optimizer.learning_rate for run in runs if run.variant.startswith("vespo")} == {0.5}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 16]", "[1, 3]", r"run 'vespo, staleness=3', seed 1: .*\n.*algorithm.steps: 64 is not a multiple"),
        ("algorithm.steps: 64", "algorithm.stepps: 64", r"run 'vespo, staleness=1'.*\n.*algorithm.stepps: unknown key"),
        ("seeds: [1, 7]", "seeds: [1, 1]", "seeds: a seed occurs twice"),
        ("{algorithm.steps: 64}", "{seed: 3}", "set.seed: decided by the grid itself"),
        ("[1, 16]", "[]", "grid.algorithm.staleness: no values"),
        ("vespo: {}", "vespo: {grid: {algorithm.staleness: []}}", "variants.vespo.grid.algorithm.staleness: no values"),
        ("vespo: {}", "vespo: {grid: {seed: [1]}}", "variants.vespo.grid.seed: decided by the grid itself"),
        ("  vespo: {}\n", "  a/b: {}\n  a b: {}\n", "would share a folder"),
        ("title: Two by two\n", "", "title: required"),
    ],
)
def test_mistakes_are_said_with_the_run_that_has_them(folder, old, new, message):
    with pytest.raises(ConfigError, match=message):
        planned(folder, GRID.replace(old, new))
