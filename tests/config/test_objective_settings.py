"""Kernels, corrections, advantages: what can be set, and what is refused before a run."""

from pathlib import Path

import pytest

from megatron_vespo.config import AlgorithmConfig, ConfigError, ObjectiveConfig, TrainConfig, load_config

QUICKSTART = "examples/quickstart.yaml"
EXAMPLES = sorted(Path("examples/objectives").glob("*.yaml"))


def settings(*overrides):
    return load_config(TrainConfig, QUICKSTART, list(overrides)).algorithm


def mistakes(*overrides):
    with pytest.raises(ConfigError) as caught:
        settings(*(f"algorithm.{override}" for override in overrides))
    return str(caught.value)


def test_the_default_is_vespo_with_its_published_coefficients():
    kernel = ObjectiveConfig().kernel
    assert (kernel.name, kernel.length_normalisation) == ("vespo", "none")
    assert [(side.c1, side.c2) for side in (kernel.positive, kernel.negative)] == [(2.0, 3.0), (3.0, 2.0)]


def test_a_name_alone_takes_the_published_settings():
    assert (
        settings("algorithm.objective.kernel=dapo").objective.kernel
        == ObjectiveConfig(kernel={"name": "dapo", "clip_low": 0.2, "clip_high": 0.28}).kernel
    )
    assert (
        settings("algorithm.old_policy=proximal", "algorithm.objective.engine_correction=icepop").old_policy
        == "proximal"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.kernel=grop", "objective.kernel: Input tag 'grop'"),
        ("objective.kernel={clip_low: 0.1}", "objective.kernel: Unable to extract tag using discriminator 'name'"),
        ("objective.kernel={name: grpo, clip: 0.1}", "objective.kernel.clip: unknown key"),
        ("objective.kernel={name: grpo, clip_low: 2}", "objective.kernel.clip_low: Input should be less than"),
        ("objective.kernel={name: grpo, dual_clip: 1}", "objective.kernel.dual_clip: Input should be greater than 1"),
        ("objective.kernel.positive.c1=-1", "objective.kernel.positive.c1: Input should be greater than 0"),
        ("objective.kernel={name: cispo, ratio_min: 6}", "objective.kernel.ratio_min: 6.0 must be less than"),
        ("objective.positive={c1: 2, c2: 3}", "objective.positive: unknown key"),
        ("objective.aggregation=constant_length", "objective.constant_length: required by aggregation"),
        ("objective.constant_length=64", "objective.constant_length: of no use with aggregation: token_mean"),
        ("objective.engine_correction=tis", "objective.engine_correction: tis needs old_policy: proximal"),
        ("objective.kl={coefficient: 0.1, estimator: k1}", "objective.kl.estimator: the gradient of k1"),
        ("advantage.estimator=custom", "advantage.function: required by estimator: custom"),
        ("advantage.function=a:b", "advantage.estimator: group_normalised takes no function"),
        ("overlong_shaping.buffer_tokens=65", "overlong_shaping.buffer_tokens: 65 is more than rollout.max_resp"),
    ],
)
def test_what_cannot_work_is_said_with_its_key(override, said):
    assert f"  algorithm.{said}" in mistakes(override)


@pytest.mark.parametrize("band", ["{name: icepop, low: 2}", "{name: icepop, high: 0.9}"])
def test_a_band_without_one_is_refused(band):
    assert "must hold 1" in mistakes("old_policy=proximal", f"objective.engine_correction={band}")


def test_the_name_dr_grpo_keeps_its_promise():
    message = mistakes("objective.kernel=dr_grpo")
    assert "algorithm.advantage.estimator: kernel dr_grpo needs group_mean" in message
    assert "algorithm.objective.aggregation: kernel dr_grpo needs constant_length" in message


def test_k1_is_allowed_as_a_reward():
    penalty = "algorithm.objective.kl={coefficient: 0.1, estimator: k1, place: reward}"
    kl = settings(penalty, "policy.reference={}").objective.kl
    assert (kl.estimator, kl.place) == ("k1", "reward")
    assert "needs a frozen model: set policy.reference" in mistakes(penalty.removeprefix("algorithm."))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_has_a_folder_of_its_own(path):
    config = load_config(TrainConfig, path)
    assert config.run_dir == f"runs/objectives/{path.stem}"
    assert config.algorithm.steps == 120 and isinstance(config.algorithm, AlgorithmConfig)


def test_there_is_an_example_of_every_published_objective():
    kernels = {load_config(TrainConfig, path).algorithm.objective.kernel.name for path in EXAMPLES}
    published = {"vespo", "reinforce", "importance", "truncated_importance", "ppo", "grpo", "dr_grpo", "dapo"}
    assert kernels == published | {"gspo", "gspo_token", "sapo", "cispo", "topr"}
