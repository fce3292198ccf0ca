"""Qwen3 and Llama 3, tied and untied: the engine computes what transformers does, and holds what was sent."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from broadcast import group_with, update
from held_weights import differences, number_of_tensors, weights_in
from rollouts import collect, random_prompts, sampled
from test_engine_equals_transformers import naive_log_probs
from tiny_engine import RunningEngine, running_engine, write_tiny_architecture

from megatron_vespo.config import RolloutConfig

pytestmark = pytest.mark.engine

DETERMINISTIC = [("dense", True, True), ("llama", False, True)]
OTHERS = [("dense", False, False), ("llama", True, False)]
"""Architecture, tied embeddings, deterministic."""

FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


@dataclass
class Served:
    engine: RunningEngine
    rollout: RolloutConfig
    other_weights: Path
    tied: bool


@pytest.fixture(
    scope="module",
    params=[*DETERMINISTIC, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)],
    ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}-{'deterministic' if case[2] else 'plain'}",
)
def served(request, tmp_path_factory) -> Iterator[Served]:
    kind, tied, deterministic = request.param
    root = tmp_path_factory.mktemp("dense")
    for seed, name in enumerate(("model", "other")):
        write_tiny_architecture(root / name, kind, tied=tied, seed=seed)
    rollout = RolloutConfig(group_size=3, max_response_tokens=24, deterministic=deterministic)
    with running_engine(root / "model", root / "engine.log", deterministic=deterministic) as engine:
        yield Served(engine, rollout, root / "other", tied)


def prompts():
    """Short ones, and one that reaches far into the rotary frequencies."""
    first, *others = random_prompts(6)
    return [*others, type(first)("long", "", np.resize(first.token_ids, 216), 0, None)]


def largest_difference(groups, folder, **changes) -> float:
    """Between the engine's log-probs and those of transformers' model with a changed config."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()
    return max(
        np.abs(t.behavior_log_probs - naive_log_probs(reference, t, 1.0)).max()
        for group in groups.values()
        for t in group.trajectories
    )


def test_log_probs_are_those_of_transformers(served):
    engine = served.engine
    groups = collect(engine, prompts(), served.rollout)
    assert largest_difference(groups, engine.model_path) < 1e-5
    if "rope_scaling" in json.loads((engine.model_path / "config.json").read_text()):
        unscaled = {"rope_type": "default", "rope_theta": 10000.0}
        assert largest_difference(groups, engine.model_path, rope_parameters=unscaled) > 1e-3


@pytest.mark.parametrize("served", DETERMINISTIC, indirect=True, ids=lambda case: case[0])
def test_bitwise_equal_whatever_is_sampled_beside_it(served):
    first = sampled(collect(served.engine, prompts(), served.rollout))
    one_by_one = served.rollout.model_copy(update={"concurrent_groups": 1})
    assert sampled(collect(served.engine, prompts()[::-1], one_by_one)) == first


def test_a_sync_brings_every_tensor_and_a_single_wrong_number_is_found(served):
    engine, tensors = served.engine, weights_in(served.other_weights)
    assert differences(engine, weights_in(engine.model_path)) == []
    assert ("lm_head.weight" in tensors) is not served.tied
    assert len(differences(engine, tensors)) == number_of_tensors(engine)
    with group_with(engine) as group:
        update(engine, group, tensors, weight_version=1)
        assert differences(engine, tensors) == []
        groups = collect(engine, prompts(), served.rollout, weight_version=1)
        assert largest_difference(groups, served.other_weights) < 1e-5

        for name in (name for name in tensors if ".layers.0." not in name):
            wrong = tensors[name].clone()
            wrong.flatten()[-1:].copy_(torch.nextafter(wrong.flatten()[-1:], torch.tensor(9.0)))
            update(engine, group, {name: wrong}, weight_version=2)
            *prefix, part, weight = name.split(".")
            held = ".".join([*prefix, FUSED.get(part, part), weight])
            assert [line.split(":")[0] for line in differences(engine, tensors)] == [held]
            update(engine, group, {name: tensors[name]}, weight_version=3)

        update(engine, group, weights_in(engine.model_path), weight_version=0)
    assert differences(engine, weights_in(engine.model_path)) == []
