import numpy as np
import pytest
import torch
from rollouts import collect, random_prompts

from megatron_vespo.config import RolloutConfig, SamplingConfig
from megatron_vespo.rollout.generate import generate_responses

pytestmark = pytest.mark.engine

STOP = list(range(2, 20))
MODELS_OWN_EOS = 2


@pytest.fixture(scope="module")
def reference(tiny_qwen3_moe):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_qwen3_moe, dtype=torch.float32).eval()


def naive_log_probs(model, trajectory, temperature: float) -> np.ndarray:
    """log_softmax(logits / T) at each position that precedes a response token, one sequence, no cache."""
    full = np.concatenate([trajectory.prompt.token_ids, trajectory.response_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(full)[None]).logits[0]
    table = torch.log_softmax(logits / temperature, dim=-1)
    first = len(trajectory.prompt.token_ids)
    return np.array([table[i - 1, full[i]].item() for i in range(first, len(full))])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_the_sampled_distribution(engine, reference, temperature):
    rollout = RolloutConfig(
        group_size=3, max_response_tokens=24, sampling=SamplingConfig(temperature=temperature), deterministic=True
    )
    groups = collect(engine, random_prompts(6), rollout)
    for group in groups.values():
        for trajectory in group.trajectories:
            expected = naive_log_probs(reference, trajectory, temperature)
            np.testing.assert_allclose(trajectory.behavior_log_probs, expected, atol=1e-5, rtol=0)


def test_greedy_evaluation_takes_the_likeliest_token(engine, reference):
    async def gather():
        stream = generate_responses(
            engine.fleet,
            random_prompts(4),
            SamplingConfig(temperature=0.0),
            samples_per_prompt=2,
            max_response_tokens=12,
            deterministic=True,
            concurrent_groups=2,
            stop_token_ids=[2],
            vocab_size=engine.vocab_size,
            run_seed=1,
            weight_version=0,
        )
        return [group async for group in stream]

    for group in engine.run(gather()):
        first, second = group.trajectories
        np.testing.assert_array_equal(first.response_ids, second.response_ids)
        np.testing.assert_allclose(first.behavior_log_probs, naive_log_probs(reference, first, 1.0), atol=1e-5)
        ids = torch.from_numpy(first.prompt.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            greedy = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2)[0, ids.shape[1] :]
        np.testing.assert_array_equal(first.response_ids, greedy.numpy())


def test_evaluation_samples_only_from_the_nucleus(engine, reference):
    top_p = 0.7

    async def gather():
        stream = generate_responses(
            engine.fleet,
            random_prompts(4, seed=3),
            SamplingConfig(top_p=top_p),
            samples_per_prompt=4,
            max_response_tokens=16,
            deterministic=True,
            concurrent_groups=4,
            stop_token_ids=[2],
            vocab_size=engine.vocab_size,
            run_seed=1,
            weight_version=0,
        )
        return [group async for group in stream]

    for group in engine.run(gather()):
        for t in group.trajectories:
            full = torch.from_numpy(np.concatenate([t.prompt.token_ids, t.response_ids]).astype(np.int64))
            with torch.no_grad():
                probs = reference(full[None]).logits[0].softmax(-1)
            for i in range(len(t.prompt.token_ids), len(full)):
                before = probs[i - 1][probs[i - 1] > probs[i - 1, full[i]]].sum().item()
                assert before <= top_p + 1e-4


def test_the_stop_token_ends_a_response_and_is_kept(engine):
    rollout = RolloutConfig(group_size=4, max_response_tokens=40, deterministic=True)
    groups = collect(engine, random_prompts(8), rollout, stop_token_ids=STOP)
    trajectories = [t for group in groups.values() for t in group.trajectories]
    for t in trajectories:
        assert not np.isin(t.response_ids[:-1], STOP).any()
        assert (t.response_ids[-1] in STOP) == (t.finish_reason == "stop")
        assert t.truncated == (len(t.response_ids) == 40 and t.response_ids[-1] not in STOP)
        assert len(t.behavior_log_probs) == len(t.response_ids)
        assert [(s.start, s.end, s.weight_version) for s in t.segments] == [(0, len(t.response_ids), 0)]
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}


def test_the_longest_sequence_is_not_cut_short(engine):
    """Prompt and response together fill `max_sequence_tokens`, to the last token."""
    (prompt,) = random_prompts(1)
    prompt = type(prompt)("long", "", np.resize(prompt.token_ids, 216), 0, None)
    rollout = RolloutConfig(group_size=2, max_response_tokens=40, deterministic=True)
    groups = collect(engine, [prompt], rollout, stop_token_ids=[])
    for t in groups["long"].trajectories:
        assert len(t.response_ids) == 40 or t.response_ids[-1] == MODELS_OWN_EOS
