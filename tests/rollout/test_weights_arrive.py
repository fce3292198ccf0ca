import pytest
import torch
from broadcast import group_with, update
from held_weights import differences, number_of_tensors, weights_in
from rollouts import collect, random_prompts, sampled
from tiny_engine import running_engine, write_tiny_qwen3_moe

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.response_checks import ResponseError

pytestmark = pytest.mark.engine


@pytest.fixture
def other_weights(tmp_path):
    folder = tmp_path / "other"
    write_tiny_qwen3_moe(folder, seed=1)
    return folder


@pytest.fixture
def restored(engine):
    """A group for updates; afterwards the engine holds its own weights again."""
    with group_with(engine) as group:
        yield group
        update(engine, group, weights_in(engine.model_path), weight_version=0)
    assert differences(engine, weights_in(engine.model_path)) == []


def test_checksums_are_those_of_the_checkpoint(engine):
    tensors = weights_in(engine.model_path)
    assert differences(engine, tensors) == []
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    changed = tensors | {name: tensors[name].clone()}
    changed[name][3, 2] = torch.nextafter(changed[name][3, 2], torch.tensor(9.0))
    assert [d.split(":")[0] for d in differences(engine, changed)] == ["model.layers.1.mlp.experts.w13_weight"]
    del changed["lm_head.weight"]
    assert "lm_head.weight: only on the engine" in " ".join(differences(engine, changed))
    assert "extra: the engine has no such" in " ".join(differences(engine, tensors | {"extra": torch.zeros(1)}))


def test_an_updated_engine_equals_a_cold_one(engine, restored, other_weights, tmp_path):
    """Bitwise, on prompts that the engine had already seen under its old weights."""
    prompts = random_prompts(12)
    rollout = RolloutConfig(group_size=4, max_response_tokens=24, deterministic=True)
    before = sampled(collect(engine, prompts, rollout))
    tensors = weights_in(other_weights)
    assert len(differences(engine, tensors)) == number_of_tensors(engine)

    update(engine, restored, tensors, weight_version=4)

    assert differences(engine, tensors) == []
    assert engine.run(engine.client.weight_version()) == "4"
    updated = sampled(collect(engine, prompts, rollout, weight_version=4))
    assert not any(updated[key] == before[key] for key in before)
    assert sampled(collect(engine, prompts[::-1], rollout, weight_version=4)) == updated

    with running_engine(other_weights, tmp_path / "cold.log", weight_version=4) as cold:
        assert sampled(collect(cold, prompts, rollout, weight_version=4)) == updated

    update(engine, restored, weights_in(engine.model_path), weight_version=0)
    assert sampled(collect(engine, prompts, rollout)) == before


def test_a_tensor_that_the_engine_ignored_is_found(engine, restored):
    tensors = weights_in(engine.model_path)
    name = "model.norm.weight"
    update(engine, restored, {"model.nrom.weight": tensors[name] + 1}, weight_version=1)
    sent = tensors | {name: tensors[name] + 1}
    assert [d.split(":")[0] for d in differences(engine, sent)] == [name]


def test_responses_of_other_weights_are_refused(engine):
    rollout = RolloutConfig(group_size=2, max_response_tokens=4, deterministic=True)
    with pytest.raises(ResponseError, match=r"sampled under weights \{'0'\}, expected 3"):
        collect(engine, random_prompts(1), rollout, weight_version=3)
