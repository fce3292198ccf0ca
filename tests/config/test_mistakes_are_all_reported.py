"""Whatever is wrong in a configuration is said at once, with the path of each key, before anything starts."""

import subprocess
import sys

import pytest
import yaml

from megatron_vespo.config import ConfigError, SFTConfig, TrainConfig, load_config

QUICKSTART = "examples/quickstart.yaml"


@pytest.fixture
def config_file(tmp_path):
    def write(**changes):
        with open(QUICKSTART) as file:
            values = yaml.safe_load(file)
        values.update(changes)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def mistakes(*overrides, path=QUICKSTART):
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, list(overrides))
    return str(caught.value)


def test_the_quickstart_is_valid_and_overrides_apply():
    config = load_config(
        TrainConfig, QUICKSTART, ["seed=2", "algorithm.staleness=8", "data.sources.0.task=spell_backward"]
    )
    assert (config.seed, config.algorithm.staleness, config.data.sources[0].task) == (2, 8, "spell_backward")
    assert config.algorithm.rollout_batch_prompts == 8 * config.algorithm.prompts_per_step


def test_every_mistake_is_named_at_once():
    message = mistakes("optimiser.lr=1", "rollout.group_size=0", "seed=x")
    for part in ("optimiser: unknown key", "rollout.group_size", "seed"):
        assert part in message
    assert "3 mistakes" in message


def test_every_contradiction_is_named_at_once():
    message = mistakes(
        *("policy.ranks=3", "algorithm.steps=121", "optimizer.warmup_steps=500", "rollout.sampling.top_p=0.9"),
        *("rollout.sampling.top_k=5", "optimizer.min_learning_rate=1", "weight_sync.transport=disk"),
    )
    for key in (
        "policy.ranks",
        "algorithm.steps",
        "optimizer.warmup_steps",
        "rollout.sampling.top_p",
        "weight_sync.disk.folder",
    ):
        assert f"  {key}: " in message
    assert "7 mistakes" in message


def test_an_override_changes_one_place_even_where_yaml_shares_it():
    config = load_config(TrainConfig, QUICKSTART, ["data.sources.0.settings.max_terms=6"])
    assert config.data.sources[0].settings["max_terms"] == 6
    assert config.evaluation.exclude[0].source.settings["max_terms"] == 5


def test_a_path_is_one_that_overrides_take():
    assert mistakes("data.sources.0.tsak=x").endswith("1 mistake\n  data.sources.0.tsak: unknown key")


def test_a_mistyped_key_is_refused():
    assert "optimizer.learning_rte: unknown key" in mistakes("optimizer.learning_rte=1e-4")


@pytest.mark.parametrize(
    "setting",
    ["top_p=0.9", "top_k=50", "min_p=0.1", "frequency_penalty=0.5", "repetition_penalty=1.1", 'logit_bias={"5": 1.0}'],
)
def test_sampling_that_changes_the_distribution_is_refused_in_training(setting):
    message = mistakes(f"rollout.sampling.{setting}")
    assert setting.split("=")[0] in message and "behavior log-probs" in message


def test_the_same_sampling_is_allowed_in_evaluation():
    config = load_config(
        TrainConfig, QUICKSTART, ["evaluation.sampling.top_p=0.7", "evaluation.sampling.temperature=0"]
    )
    assert config.evaluation.sampling.top_p == 0.7


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.steps=10"], "Use steps=12"),
        (["algorithm.over_sampling=1.5"], "it needs advantage.zero_variance_groups: filter"),
        (["algorithm.prompts_per_rollout_batch=100"], "(4 * 16 = 64)"),
        (["algorithm.prompts_per_step=1", "rollout.group_size=2", "policy.ranks=4"], "4 data-parallel ranks"),
        (["rollout.group_size=1"], "greater than or equal to 2"),
        (["optimizer.warmup_steps=120"], "must be less than the steps of the run (120)"),
        (["optimizer.min_learning_rate=1"], "1.0 is larger"),
    ],
)
def test_sizes_that_do_not_divide_say_what_would(overrides, said):
    assert said in mistakes(*overrides)


def test_a_source_of_unknown_type_is_refused(config_file):
    path = config_file(data={"sources": [{"type": "reasoning_gim", "task": "chain_sum"}]})
    assert "data.sources.0" in mistakes(path=path)


@pytest.mark.parametrize(
    ("override", "named"),
    [("seed", "seed"), ("=3", "=3"), ("seed.x=1", "seed.x"), ("data.sources.7.task=a", "data.sources.7.task")],
)
def test_a_malformed_override_is_named(override, named):
    assert f"override '{named}'" in mistakes(override)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such"):
        load_config(TrainConfig, "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(SFTConfig, broken)


def test_supervised_training_refuses_what_only_an_objective_has():
    with pytest.raises(ConfigError) as refused:
        load_config(
            SFTConfig, "examples/tiny_base.sft.yaml", ["optimizer.scale_by_kept_gradient=true", "policy.reference={}"]
        )
    assert "optimizer.scale_by_kept_gradient: supervised training has no kernel" in str(refused.value)
    assert "policy.reference: supervised training has no KL term" in str(refused.value)


def test_importing_the_configuration_loads_neither_torch_nor_ray():
    code = "import sys, megatron_vespo.config; sys.exit(bool({'torch', 'ray', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_exits_with_2_before_anything_starts():
    command = [sys.executable, "-m", "megatron_vespo", "train", QUICKSTART, "foo=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "foo: unknown key" in done.stderr and "Traceback" not in done.stderr


def test_dry_run_prints_the_configuration_and_what_it_comes_to():
    command = [sys.executable, "-m", "megatron_vespo", "train", QUICKSTART, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "64 prompts x 8 = 512 trajectories = 4 steps of 128" in done.stdout
    assert "std_ddof: 1" in done.stdout
