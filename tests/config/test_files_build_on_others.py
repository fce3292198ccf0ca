"""`base:` lays a file over another one; what is in neither is an error that names the file."""

import pytest
import yaml

from megatron_vespo.config import ConfigError, TrainConfig, load_config

QUICKSTART = "examples/quickstart.yaml"


@pytest.fixture
def write(tmp_path):
    def file(name, **values):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
        return path

    return file


@pytest.fixture
def quickstart(write):
    with open(QUICKSTART) as file:
        return write("quickstart.yaml", **yaml.safe_load(file))


def test_what_is_not_said_comes_from_the_base(write, quickstart):
    path = write("own.yaml", base="quickstart.yaml", run_dir="runs/own", algorithm={"staleness": 8})
    config, base = load_config(TrainConfig, path), load_config(TrainConfig, quickstart)
    expected = base.model_dump()
    expected["run_dir"] = "runs/own"
    expected["algorithm"]["staleness"] = 8
    assert config.model_dump() == expected


def test_bases_have_bases_and_paths_are_relative_to_their_file(write, quickstart):
    write("between/one.yaml", base="../quickstart.yaml", seed=5, run_dir="runs/one")
    path = write("above/two.yaml", base="../between/one.yaml", run_dir="runs/two")
    config = load_config(TrainConfig, path)
    assert (config.seed, config.run_dir, config.algorithm.steps) == (5, "runs/two", 120)


def test_a_mapping_of_another_kind_replaces_that_of_the_base(write, quickstart):
    """vespo's coefficients are no settings of grpo."""
    kernel = {"name": "grpo", "clip_high": 0.28}
    path = write("own.yaml", base="quickstart.yaml", algorithm={"objective": {"kernel": kernel}})
    assert load_config(TrainConfig, path).algorithm.objective.kernel.clip_high == 0.28


def test_a_mapping_of_the_same_kind_is_laid_over_that_of_the_base(write, quickstart):
    kernel = {"name": "vespo", "positive": {"c1": 1.0}}
    path = write("own.yaml", base="quickstart.yaml", algorithm={"objective": {"kernel": kernel}})
    found = load_config(TrainConfig, path).algorithm.objective.kernel
    assert (found.positive.c1, found.positive.c2, found.negative.c1) == (1.0, 3.0, 3.0)


def test_a_list_replaces_that_of_the_base(write, quickstart):
    sources = [{"type": "reasoning_gym", "task": "spell_backward"}]
    path = write("own.yaml", base="quickstart.yaml", data={"sources": sources}, evaluation={"exclude": []})
    config = load_config(TrainConfig, path)
    assert [source.task for source in config.data.sources] == ["spell_backward"]
    assert config.evaluation.exclude == () and config.data.max_prompt_tokens == 64


def test_overrides_come_last(write, quickstart):
    path = write("own.yaml", base="quickstart.yaml", seed=5)
    assert load_config(TrainConfig, path, ["seed=9"]).seed == 9


def test_a_missing_base_is_named_with_the_file_that_wants_it(write):
    path = write("own.yaml", base="nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file \(base of .*own\.yaml\)"):
        load_config(TrainConfig, path)


def test_a_circle_of_bases_is_named(write):
    write("one.yaml", base="two.yaml")
    path = write("two.yaml", base="one.yaml")
    with pytest.raises(ConfigError, match=r"one\.yaml: base: .*two\.yaml -> .*one\.yaml -> .*two\.yaml"):
        load_config(TrainConfig, path)


@pytest.mark.parametrize("base", [3, None, ["quickstart.yaml"]])
def test_a_base_that_is_no_path_is_refused(write, base):
    with pytest.raises(ConfigError, match="base: expected the path of a configuration file"):
        load_config(TrainConfig, write("own.yaml", base=base))


def test_mistakes_of_the_base_are_said_with_its_keys(write, quickstart):
    path = write("own.yaml", base="quickstart.yaml", algorithm={"staleness": 7})
    with pytest.raises(ConfigError, match=r"own\.yaml: 1 mistake\n  algorithm\.steps: 120 is not a multiple"):
        load_config(TrainConfig, path)
