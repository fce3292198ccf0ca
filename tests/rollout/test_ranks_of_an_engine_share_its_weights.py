"""Engines of two tensor-parallel ranks: they compute what one process does, and each rank holds its part of what was sent."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from broadcast import group_with, update
from held_weights import differences, number_of_tensors, weights_in
from rollouts import collect, random_prompts
from test_dense_models_are_served_and_synced import largest_difference
from tiny_engine import RunningEngine, running_engine, tiny_server, write_tiny_architecture, write_tiny_qwen3_moe

from megatron_vespo.config import ConfigError, EngineConfig, RolloutConfig
from megatron_vespo.rollout.engine_arguments import check_tensor_parallel
from megatron_vespo.rollout.fused_checksums import EngineRank

WRONG = {
    "q_proj": ("qkv_proj", {0, 1}),
    "k_proj": ("qkv_proj", {0, 1}),
    "o_proj": ("o_proj", {0, 1}),
    "down_proj": ("down_proj", {0, 1}),
    "up_proj": ("gate_up_proj", {0, 1}),
    "experts.3.up_proj": ("experts.w13_weight", {0, 1}),
    "experts.7.down_proj": ("experts.w2_weight", {0, 1}),
    "embed_tokens": ("embed_tokens", {0, 1}),
    "lm_head": ("lm_head", {0, 1}),
    "q_norm": ("q_norm", {0}),
    "mlp.gate": ("mlp.gate", {0}),
}
"""Hugging Face part -> the engine's tensor, and the ranks between whose shards its first and last number fall; {0}: each
rank has the whole of it."""


@dataclass
class Served:
    engine: RunningEngine
    other_weights: Path


@pytest.fixture(scope="module", params=["moe", "dense"])
def served(request, tmp_path_factory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("model", "other")):
        if request.param == "moe":
            write_tiny_qwen3_moe(root / name, seed)
        else:
            write_tiny_architecture(root / name, "dense", tied=True, seed=seed, intermediate_size=128)
    with running_engine(root / "model", root / "engine.log", ranks=2, deterministic=False) as engine:
        yield Served(engine, root / "other")


@pytest.mark.engine
def test_two_ranks_compute_what_one_process_does_before_and_after_a_sync(served):
    engine, rollout = served.engine, RolloutConfig(group_size=2, max_response_tokens=16)
    assert differences(engine, weights_in(engine.model_path)) == []
    groups = collect(engine, random_prompts(4), rollout)
    assert largest_difference(groups, engine.model_path) < 1e-5

    tensors = weights_in(served.other_weights)
    assert len(differences(engine, tensors)) == number_of_tensors(engine)
    with group_with(engine) as group:
        update(engine, group, tensors, weight_version=1)
        assert differences(engine, tensors) == []
        groups = collect(engine, random_prompts(4), rollout, weight_version=1)
        assert largest_difference(groups, served.other_weights) < 1e-5
        update(engine, group, weights_in(engine.model_path), weight_version=0)


@pytest.mark.engine
def test_a_single_wrong_number_is_found_on_the_rank_that_has_it(served):
    engine, tensors = served.engine, weights_in(served.engine.model_path)
    checked = 0
    for part, (held, ranks) in WRONG.items():
        for name in (name for name in tensors if f".{part}.weight" in f".{name}" and ".layers.0." not in name):
            if ("experts" in name) is not ("experts" in part):
                continue
            for place, rank in ((0, min(ranks)), (-1, max(ranks))):
                wrong = tensors[name].clone()
                wrong.flatten()[place] += 1
                lines = differences(engine, tensors | {name: wrong})
                expected = [rank] if len(ranks) > 1 else [0, 1]
                assert [line.split(":")[0] for line in lines] == [f"rank {number}" for number in expected], name
                assert all(held in line for line in lines)
                checked += 1
    assert checked >= 14


@pytest.mark.parametrize(("rank", "heads"), [(0, [0]), (1, [0]), (2, [1]), (3, [1])])
def test_with_fewer_key_heads_than_ranks_several_have_the_same(rank, heads):
    keys = torch.arange(8).view(8, 1)  # two heads of four rows
    shard = EngineRank(rank, 4, kv_heads=2).shard("model.layers.0.self_attn.k_proj.weight", keys)
    assert shard.flatten().tolist() == [4 * head + row for head in heads for row in range(4)]


def test_sizes_that_do_not_divide_are_refused(tiny_qwen3_moe, tmp_path):
    changed = json.loads((tiny_qwen3_moe / "config.json").read_text()) | {"moe_intermediate_size": 96}
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(changed))
    narrow = str(tmp_path / "narrow")
    with pytest.raises(ConfigError, match="moe_intermediate_size 96, which does not divide by 64"):
        check_tensor_parallel(narrow, 2, "cpu")
    check_tensor_parallel(narrow, 2, "cuda")
    for ranks, device, key in ((3, "cuda", "num_attention_heads"), (4, "cpu", "num_key_value_heads")):
        with pytest.raises(ConfigError, match=key):
            tiny_server(tiny_qwen3_moe, tmp_path / "log", engine=EngineConfig(tensor_parallel=ranks), device=device)
    check_tensor_parallel(str(tiny_qwen3_moe), 4, "cuda")
