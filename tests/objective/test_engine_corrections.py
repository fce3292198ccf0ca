"""Corrections for engine and trainer that disagree, against plain loops, alone and in the loss."""

import math
from dataclasses import replace

import pytest
import torch
from packed_batches import batch, loss_and_gradient
from published_objectives import clip, gspo_token, reinforce, sapo, weight
from test_every_kernel_is_its_paper import published

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.engine_correction import engine_log_weights
from megatron_vespo.objective.importance import NotFiniteError


def token_rule(keep):
    """A correction of each token by itself; `keep`: rho -> weight."""
    return lambda rhos: [keep(rho) for rho in rhos]


def sequence_rule(keep):
    return lambda rhos: [keep(math.prod(rhos))] * len(rhos)


def capped(cap):
    return lambda rho: min(rho, cap)


def within(low, high):
    return lambda rho: rho if low <= rho <= high else 0.0


CORRECTIONS = {
    "none": ("none", token_rule(lambda rho: 1.0)),
    "tis": ({"name": "tis", "cap": 1.2}, token_rule(capped(1.2))),
    "tis of sequences": ({"name": "tis", "level": "sequence", "cap": 1.2}, sequence_rule(capped(1.2))),
    "masked": ({"name": "masked_is", "level": "token", "cap": 1.3}, token_rule(within(0.0, 1.3))),
    "masked sequences": ({"name": "masked_is", "cap": 1.3}, sequence_rule(within(0.0, 1.3))),
    "icepop": ({"name": "icepop", "low": 0.7, "high": 1.4}, token_rule(within(0.7, 1.4))),
}


def corrected(setting, data, behavior):
    config = ObjectiveConfig(engine_correction=setting)
    return config, engine_log_weights(
        config.engine_correction, data.old_log_probs, behavior, data.response_mask, data.cu_seqlens
    )


def behavior_of(data, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return data.old_log_probs + 0.3 * torch.randn(len(data.old_log_probs), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_are_those_of_a_plain_loop(name):
    setting, rule = CORRECTIONS[name]
    data = batch(3)
    behavior = behavior_of(data)
    _, found = corrected(setting, data, behavior)
    expected, kinds = torch.zeros_like(found), set()
    for a, b in data.bounds():
        chosen = [t for t in range(a, b) if data.response_mask[t]]
        rhos = [math.exp(data.old_log_probs[t] - behavior[t]) for t in chosen]
        for t, value, rho in zip(chosen, rule(rhos), rhos, strict=True):
            expected[t] = math.log(value) if value > 0 else -math.inf
            kinds.add("masked" if value == 0 else "kept" if value == rho else "changed")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert len(kinds) > 1 or name == "none"


TOKEN_KERNELS = {
    "reinforce": ("reinforce", reinforce),
    "grpo": ("grpo", clip),
    "sapo": ("sapo", sapo),
    "gspo": ({"name": "gspo", "clip_low": 0.05, "clip_high": 0.08}, lambda *x: gspo_token(*x, 0.05, 0.08)),
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kernel", TOKEN_KERNELS)
def test_other_kernels_multiply_each_token(kernel, correction):
    """w min(r A, clip(r) A) is the same objective with advantage w A, for w >= 0."""
    data = batch(3)
    config, log_weights = corrected(CORRECTIONS[correction][0], data, behavior_of(data))
    setting, objective = TOKEN_KERNELS[kernel]
    config = config.model_copy(update={"kernel": ObjectiveConfig(kernel=setting).kernel})
    loss, gradient, _ = loss_and_gradient(config, data, engine_log_weights=log_weights)
    spread = data.advantages.repeat_interleave(torch.tensor(data.lengths))
    expected = published(objective, replace(data, advantages=spread * log_weights.exp()))
    torch.testing.assert_close((loss, gradient), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_vespo_takes_the_correction_into_w(correction):
    setting, rule = CORRECTIONS[correction]
    data = batch(3)
    behavior = behavior_of(data)
    config, log_weights = corrected(setting, data, behavior)
    _, _, metrics = loss_and_gradient(config, data, engine_log_weights=log_weights)
    for i, (a, b) in enumerate(data.bounds()):
        chosen = [t for t in range(a, b) if data.response_mask[t]]
        if not chosen:
            continue
        weights = rule([math.exp(data.old_log_probs[t] - behavior[t]) for t in chosen])
        factor = weights[0] if "sequence" in correction else math.prod(weights)
        W = float(weight(data.log_probs[chosen], data.old_log_probs[chosen])) * factor
        c1, c2 = (2.0, 3.0) if data.advantages[i] >= 0 else (3.0, 2.0)
        assert float(metrics.sequences["phi"][i]) == pytest.approx(W**c1 * math.exp(c2 * (1 - W)), rel=1e-6)


def test_no_disagreement_is_no_correction():
    data = batch(4)
    for setting, _ in CORRECTIONS.values():
        config, log_weights = corrected(setting, data, data.old_log_probs)
        assert (log_weights == 0).all()
        torch.testing.assert_close(
            loss_and_gradient(config, data, engine_log_weights=log_weights)[:2], loss_and_gradient(config, data)[:2]
        )


def test_masked_tokens_and_mean_weight_are_told():
    data = batch(3)
    config, log_weights = corrected(CORRECTIONS["icepop"][0], data, behavior_of(data))
    _, _, metrics = loss_and_gradient(config, data, engine_log_weights=log_weights)
    inside = log_weights[data.response_mask]
    assert metrics.sums["engine_masked"] == (inside == -math.inf).sum() > 0
    assert float(metrics.sums["engine_weight"]) == pytest.approx(float(inside.exp().sum()))


def test_an_impossible_behavior_log_prob_names_its_trajectory():
    data = batch(lengths=(3, 4))
    data.response_mask[:] = True
    behavior = data.old_log_probs.clone()
    behavior[3] = -math.inf
    with pytest.raises(NotFiniteError, match=r"trajectory 1 .*behavior_log_probs of its response token 0 is -inf"):
        corrected("none", data, behavior)
