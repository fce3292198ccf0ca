"""The kernel and the loss against TRL's published function and against the formula in plain float64."""

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective import policy_loss
from megatron_vespo.objective.importance import sequence_log_weight
from megatron_vespo.objective.vespo import log_phi, vespo_coefficients

LENGTHS = [3, 1, 7, 4, 9, 2]


def packed(seed=0, dtype=torch.float32, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    log_probs = -torch.rand(tokens, generator=generator, dtype=dtype) * 3
    old = log_probs + scale * torch.randn(tokens, generator=generator, dtype=dtype)
    mask = torch.rand(tokens, generator=generator) > 0.3
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    advantages = torch.randn(len(LENGTHS), generator=generator)
    return log_probs.requires_grad_(), old, mask, cu_seqlens, advantages


def padded(values, cu_seqlens, fill=0.0):
    rows = [values[a:b] for a, b in itertools.pairwise(cu_seqlens)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def trl_gamma_weights():
    """TRL's `get_gamma_weights`, taken from the installed file: importing its trainer needs more than this function."""
    import trl

    source = (Path(trl.__file__).parent / "trainer" / "grpo_trainer.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "get_gamma_weights":
            node.decorator_list = []
            scope = {"torch": torch, "math": math}
            exec(compile(ast.Module([node], []), "trl", "exec"), scope)
            return scope["get_gamma_weights"]
    raise AssertionError("TRL has no get_gamma_weights")


def test_phi_matches_trl_inside_its_clamp():
    log_probs, old, mask, cu_seqlens, advantages = packed()
    difference = padded(log_probs.detach() - old, cu_seqlens)
    expected = trl_gamma_weights()(
        advantages=advantages[:, None],
        log_ratio_per_token=difference,
        mask=padded(mask.float(), cu_seqlens),
        importance_sampling_ratio=None,
    ).flatten()
    phi = vespo_coefficients(sequence_log_weight(log_probs, old, mask, cu_seqlens), advantages, ObjectiveConfig())
    torch.testing.assert_close(phi.float(), expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"])
def test_loss_and_gradient_match_the_formula_written_out(aggregation):
    log_probs, old, mask, cu_seqlens, advantages = packed()
    config = ObjectiveConfig(aggregation=aggregation)
    loss, _ = policy_loss(
        config,
        log_probs=log_probs,
        old_log_probs=old,
        advantages=advantages,
        response_mask=mask,
        cu_seqlens=cu_seqlens,
    )
    loss.backward()

    reference = log_probs.detach().double().requires_grad_()
    numerators, counts = [], []
    for i, (a, b) in enumerate(itertools.pairwise(cu_seqlens)):
        chosen = [t for t in range(a, b) if mask[t]]
        if not chosen:
            continue
        weight = math.exp(sum((reference.detach()[t] - old[t]).item() for t in chosen))
        advantage = float(advantages[i])
        c1, c2 = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        phi = weight**c1 * math.exp(c2 * (1 - weight))
        total = sum(-phi * advantage * reference[t] for t in chosen)
        numerators.append(total / len(chosen) if aggregation == "sequence_mean_token_mean" else total)
        counts.append(len(chosen) if aggregation == "token_mean" else 1)
    expected = sum(numerators) / sum(counts)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_probs.grad.double(), reference.grad, rtol=1e-5, atol=1e-7)


def test_splitting_a_step_into_calls_changes_nothing():
    log_probs, old, mask, cu_seqlens, advantages = packed()
    kwargs = {"old_log_probs": old, "advantages": advantages, "response_mask": mask, "cu_seqlens": cu_seqlens}
    whole, _ = policy_loss(ObjectiveConfig(), log_probs=log_probs, **kwargs)
    (gradient,) = torch.autograd.grad(whole, log_probs)

    pieces = torch.zeros(())
    for first, last in ((0, 2), (2, 3), (3, 6)):
        a, b = int(cu_seqlens[first]), int(cu_seqlens[last])
        part, _ = policy_loss(
            ObjectiveConfig(),
            log_probs=log_probs[a:b],
            old_log_probs=old[a:b],
            advantages=advantages[first:last],
            response_mask=mask[a:b],
            cu_seqlens=cu_seqlens[first : last + 1] - a,
            denominator=mask.sum(),
        )
        pieces = pieces + part
    (split_gradient,) = torch.autograd.grad(pieces, log_probs)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("c1", "c2"), [(2.0, 3.0), (3.0, 2.0)])
def test_phi_is_one_at_one_and_largest_at_c1_over_c2(c1, c2):
    log_weight = torch.linspace(-6, 3, 20_001, dtype=torch.float64)
    phi = log_phi(log_weight, c1, c2).exp()
    assert log_phi(torch.zeros(1, dtype=torch.float64), c1, c2).exp().item() == 1.0
    peak = int(phi.argmax())
    assert math.isclose(log_weight[peak].exp().item(), c1 / c2, rel_tol=1e-3)
    assert math.isclose(phi[peak].item(), (c1 / c2) ** c1 * math.exp(c2 - c1), rel_tol=1e-6)
    assert (phi[: peak + 1].diff() > 0).all() and (phi[peak:].diff() < 0).all()


def test_extreme_ratios_stay_finite_and_weigh_nothing():
    old = torch.tensor([-1.0, -1e4, -1.0, -1.0])
    log_probs = torch.tensor([-1e4, -1.0, -1.0, float("nan")], requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    loss, metrics = policy_loss(
        ObjectiveConfig(),
        log_probs=log_probs,
        old_log_probs=old,
        advantages=torch.tensor([1.0, -1.0, 0.0]),
        response_mask=mask,
        cu_seqlens=torch.tensor([0, 1, 2, 4], dtype=torch.int32),
    )
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()
    assert metrics.sequences["phi"].tolist() == [0.0, 0.0, 1.0]


def test_nothing_to_train_on_gives_zero():
    loss, metrics = policy_loss(
        ObjectiveConfig(),
        log_probs=torch.zeros(4, requires_grad=True),
        old_log_probs=torch.zeros(4),
        advantages=torch.ones(2),
        response_mask=torch.zeros(4, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32),
    )
    assert loss.item() == 0.0 and metrics.sums["tokens"].item() == 0
