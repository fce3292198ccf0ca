"""An engine that routes wrongly on purpose, by as much as it was told, and says where it went."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rollouts import collect, random_prompts, sampled
from tiny_engine import ROUTE_SHAPE, RunningEngine, running_engine
from transformers_routes import chosen, load, tokens_of

from megatron_vespo.config import EngineConfig, RolloutConfig
from megatron_vespo.config.rollout import RouterNoiseConfig
from megatron_vespo.rollout import router_noise
from megatron_vespo.rollout.router_noise import gate_weights, normal_noise, select_noisy_experts

SCALE = 0.1
ROLLOUT = RolloutConfig(group_size=3, max_response_tokens=60, deterministic=True)


def noisy_engine(folder, log, on: str) -> Iterator[RunningEngine]:
    engine = EngineConfig(startup_timeout_seconds=300, router_noise=RouterNoiseConfig(scale=SCALE, on=on))
    with running_engine(folder, log, engine=engine, return_routed_experts=True) as running:
        yield running


@pytest.fixture(scope="module")
def selecting(tiny_qwen3_moe, tmp_path_factory):
    yield from noisy_engine(tiny_qwen3_moe, tmp_path_factory.mktemp("selecting") / "engine.log", "selection")


@pytest.fixture(scope="module")
def weighting(tiny_qwen3_moe, tmp_path_factory):
    yield from noisy_engine(tiny_qwen3_moe, tmp_path_factory.mktemp("weighting") / "engine.log", "logits")


class Chosen(NamedTuple):
    """As SGLang's."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Forced:
    """transformers' routers go where they are told: [positions, topk] of each layer, gate weights from clean logits."""

    def __init__(self, model: torch.nn.Module, experts: np.ndarray):
        self.handles = [
            layer.mlp.gate.register_forward_hook(self.router(torch.from_numpy(experts[:, number].astype(np.int64))))
            for number, layer in enumerate(model.model.layers)
        ]
        self.clean: list[np.ndarray] = []

    def router(self, experts):
        def choose(gate, inputs, _):
            logits = torch.nn.functional.linear(inputs[0].reshape(-1, gate.weight.shape[1]), gate.weight)
            self.clean.append(logits.numpy())
            weights = logits.softmax(-1).gather(1, experts)
            return logits, weights / weights.sum(-1, keepdim=True), experts

        return choose

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def forced_forward(model, trajectory) -> tuple[np.ndarray, np.ndarray]:
    """With the experts that the engine used: log-probs [response tokens], clean router logits [positions, layers, n]."""
    tokens = tokens_of(trajectory)
    with Forced(model, trajectory.engine_routes.experts) as forced, torch.no_grad():
        logits = model(torch.from_numpy(tokens[:-1].astype(np.int64))[None]).logits[0]
    table = torch.log_softmax(logits, dim=-1).numpy()
    first = len(trajectory.prompt.token_ids)
    return table[np.arange(first - 1, len(tokens) - 1), tokens[first:]], np.stack(forced.clean, axis=1)


def changed(experts: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """[positions, layers]: other experts than those of the clean logits."""
    return (np.sort(experts, axis=-1) != np.sort(chosen(clean), axis=-1)).any(axis=-1)


@pytest.mark.engine
def test_noise_on_selection_moves_the_expected_share_and_nothing_else(selecting, tiny_qwen3_moe):
    model = load(tiny_qwen3_moe)
    rng = np.random.default_rng(0)
    groups = collect(selecting, random_prompts(16), ROLLOUT, routes=ROUTE_SHAPE)
    moved, expected, difference = [], [], 0.0
    for t in (t for group in groups.values() for t in group.trajectories):
        log_probs, clean = forced_forward(model, t)
        difference = max(difference, float(np.abs(log_probs - t.behavior_log_probs).max()))
        moved.append(changed(t.engine_routes.experts, clean))
        expected += [changed(chosen(clean + rng.normal(0, SCALE, clean.shape)), clean) for _ in range(4)]
    share, expected_share = np.concatenate(moved).mean(axis=0), np.concatenate(expected).mean(axis=0)
    print(
        f"share of tokens with other experts, by layer: {share}, expected {expected_share}; log-probs {difference:.1e}"
    )
    np.testing.assert_allclose(share, expected_share, atol=0.02)
    assert 0.05 < share.mean() < 0.1
    assert difference < 1e-4


@pytest.mark.engine
def test_noise_does_not_depend_on_what_is_computed_beside_it(selecting):
    def run(prompts, concurrent_groups):
        rollout = ROLLOUT.model_copy(update={"concurrent_groups": concurrent_groups})
        groups = collect(selecting, prompts, rollout, routes=ROUTE_SHAPE)
        routes = {
            (identity, t.sample): t.engine_routes.experts.tobytes()
            for identity, group in groups.items()
            for t in group.trajectories
        }
        return sampled(groups), routes

    prompts = random_prompts(5, seed=3)
    assert run(prompts, 5) == run(prompts[::-1], 1)


@pytest.mark.engine
@pytest.mark.slow
def test_noise_on_logits_moves_experts_and_their_weights(weighting, tiny_qwen3_moe):
    model = load(tiny_qwen3_moe)
    groups = collect(weighting, random_prompts(4), ROLLOUT, routes=ROUTE_SHAPE)
    moved, differences = [], []
    for t in (t for group in groups.values() for t in group.trajectories):
        log_probs, clean = forced_forward(model, t)
        differences.append(np.abs(log_probs - t.behavior_log_probs))
        moved.append(changed(t.engine_routes.experts, clean))
    assert 0.04 < np.concatenate(moved).mean() < 0.12
    # The forward has the engine's experts but clean gate weights, which is not what the engine had.
    assert np.median(np.concatenate(differences)) > 1e-3


@pytest.mark.parametrize("on", ["selection", "logits"])
def test_experts_follow_the_noise_and_weights_only_where_they_should(on):
    def select_experts(hidden_states, router_logits, topk_config, *, layer_id):
        weights, ids = router_logits.softmax(-1).topk(2)
        return Chosen(weights / weights.sum(-1, keepdim=True), ids, router_logits)

    plain = SimpleNamespace(
        scoring_func="softmax",
        use_grouped_topk=False,
        correction_bias=None,
        custom_routing_function=None,
        num_shared_topk_slots=0,
        routed_scaling_factor=None,
        renormalize=True,
    )
    clean = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    noisy = (clean + 0.5 * normal_noise(clean, layer=1)).numpy()
    found = select_noisy_experts(select_experts, None, clean, plain, scale=0.5, on=on, layer_id=1)
    expected = chosen(noisy)
    np.testing.assert_array_equal(found.topk_ids, expected)
    assert changed(expected, clean.numpy()).mean() > 0.2
    weighed_by = clean.numpy() if on == "selection" else noisy
    exponentials = np.exp(np.take_along_axis(weighed_by, expected, axis=-1).astype(np.float64))
    np.testing.assert_allclose(found.topk_weights, exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-5)

    grouped = SimpleNamespace(**vars(plain) | {"use_grouped_topk": True})
    if on == "selection":
        with pytest.raises(RuntimeError, match=r"not a plain softmax here \(use_grouped_topk\): use `logits`"):
            select_noisy_experts(select_experts, None, clean, grouped, scale=0.5, on=on, layer_id=1)


def test_noise_is_standard_normal_and_independent():
    logits = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    noise = normal_noise(logits, layer=3).double()
    assert noise.shape == logits.shape and noise.isfinite().all()
    flat = noise.flatten().sort().values
    ideal = torch.special.ndtr(flat)
    ranks = (torch.arange(len(flat)) + 0.5) / len(flat)
    assert (ideal - ranks).abs().max() < 1.63 / len(flat) ** 0.5  # Kolmogorov-Smirnov, 1 %
    others = [normal_noise(logits, layer=4).double(), noise.roll(1, 0), noise.roll(1, 1), logits.double()]
    for other in others:
        assert abs(float((noise * other).mean())) < 4 / len(flat) ** 0.5


def test_a_tokens_noise_is_its_own():
    logits = torch.randn(64, 128)
    whole = normal_noise(logits, layer=1)
    assert torch.equal(normal_noise(logits[7:8], layer=1), whole[7:8])
    assert torch.equal(normal_noise(logits.flip(0), layer=1), whole.flip(0))
    nearly = logits.clone()
    nearly[0, 5] = torch.nextafter(nearly[0, 5], torch.tensor(9.0))
    again = normal_noise(nearly, layer=1)
    assert torch.equal(again[1:], whole[1:]) and (again[0] != whole[0]).all()
    assert normal_noise(logits.bfloat16(), layer=1).dtype == torch.float32


def test_gate_weights_are_clean():
    logits, experts = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0, 2]])
    exponentials = np.exp([0.0, 1.0, 2.0])
    raw = exponentials / exponentials.sum()
    np.testing.assert_allclose(gate_weights(logits, experts, renormalize=False)[0], raw[[0, 2]], rtol=1e-6)
    kept = raw[[0, 2]] / raw[[0, 2]].sum()
    np.testing.assert_allclose(gate_weights(logits, experts, renormalize=True)[0], kept, rtol=1e-6)


REGISTERED = """
import sys
from megatron_vespo.rollout import router_noise, sglang_on_cpu
router_noise.register(["--host", "127.0.0.1"])
assert not any(name.startswith("sglang.") for name in sys.modules), "nothing of SGLang was touched"
sglang_on_cpu.prepare_imports()
router_noise.register(["--host", "127.0.0.1", "--router-noise", "0.5"])
from sglang.srt.plugins.hook_registry import HookRegistry
assert any(target.endswith("topk.select_experts") for target in HookRegistry._hooks)
"""


def test_a_hook_is_registered_only_where_noise_is_asked_for():
    done = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_options_come_back():
    parser = argparse.ArgumentParser()
    router_noise.add_options(parser)
    options = parser.parse_args(router_noise.as_options(RouterNoiseConfig(scale=0.125, on="logits")))
    assert (options.router_noise, options.router_noise_on) == (0.125, "logits")
