"""Token log-probs and entropy through the chunked head equal a plain softmax, without the plain one's memory."""

import dataclasses
import math

import head_examples
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vespo.policy.head import BLOCK_ROWS, ROUND_SIZE, token_scores

TOKENS, HIDDEN, VOCABULARY = 29, 16, 2 * BLOCK_ROWS + 809


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient(chunk_tokens, temperature, with_entropy):
    call = head_examples.inputs(TOKENS, HIDDEN, VOCABULARY, temperature=temperature)
    found = head_examples.chunked(call, chunk_tokens, with_entropy)
    assert (found.entropy is not None) == with_entropy
    head_examples.assert_close(found, head_examples.exact(call, with_entropy), with_entropy)


def test_whole_blocks_of_round_sizes():
    """They take another matrix product than odd sizes on a CPU; here are both, for tokens and for rows."""
    call = head_examples.inputs(ROUND_SIZE + 44, ROUND_SIZE, BLOCK_ROWS + 99, temperature=0.6)
    call.weight *= ROUND_SIZE**-0.5
    found = head_examples.chunked(call, ROUND_SIZE)
    head_examples.assert_close(found, head_examples.exact(call))


@pytest.mark.parametrize("used", ["log_probs", "entropy"])
def test_one_output_may_be_left_unused(used):
    call = head_examples.inputs(TOKENS, HIDDEN, 211)
    hidden = call.hidden.clone().requires_grad_()
    outputs = token_scores(
        hidden, call.weight, call.labels, temperature=1.0, chunk_tokens=7, vocab_size=211, with_entropy=True
    )
    (found,) = torch.autograd.grad(outputs[used == "entropy"], hidden, call.grad_log_probs)

    exact_hidden = call.hidden.double().requires_grad_()
    distribution = torch.distributions.Categorical(logits=exact_hidden @ call.weight.double().T)
    output = distribution.entropy() if used == "entropy" else distribution.log_prob(call.labels)
    (expected,) = torch.autograd.grad(output, exact_hidden, call.grad_log_probs.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [97, 4 * BLOCK_ROWS // 3])
@pytest.mark.parametrize("padding", [1e30, math.nan])
def test_padded_rows_have_no_effect_and_no_gradient(vocab_size, padding):
    call = head_examples.inputs(TOKENS, HIDDEN, vocab_size, padded=2 * BLOCK_ROWS, padding=padding)
    found = head_examples.chunked(call, 7)
    head_examples.assert_close(found, head_examples.exact(call))
    assert torch.all(found.grad_weight[vocab_size:] == 0.0)


def test_large_logits_do_not_overflow():
    call = head_examples.inputs(TOKENS, HIDDEN, VOCABULARY, temperature=0.01)
    assert (call.hidden @ call.weight.T).max() / call.temperature > 1000
    found, expected = head_examples.chunked(call, 7), head_examples.exact(call)
    assert torch.all(found.log_probs <= 0.0)
    for name in head_examples.TOLERANCES:
        goal = getattr(expected, name)
        assert (getattr(found, name).double() - goal).norm() < 1e-4 * goal.norm()


@pytest.mark.parametrize("label", [-1, 97, 99, 10_000])
def test_a_label_that_is_no_real_row_has_probability_zero(label):
    call = head_examples.inputs(3, HIDDEN, 97, padded=100)
    call.labels[1] = label
    log_probs = head_examples.chunked(call, 2).log_probs
    assert log_probs[1] == -math.inf
    assert torch.all(log_probs[[0, 2]].isfinite())


def test_no_tokens_give_no_scores_and_zero_gradients():
    found = head_examples.chunked(dataclasses.replace(head_examples.inputs(2, HIDDEN, 97), **no_tokens()), 7)
    assert found.log_probs.shape == found.entropy.shape == (0,)
    assert torch.all(found.grad_weight == 0.0)


def no_tokens():
    floats = {name: torch.empty(0) for name in ("grad_log_probs", "grad_entropy")}
    return {"hidden": torch.empty(0, HIDDEN), "labels": torch.empty(0, dtype=torch.int64), **floats}


def test_bfloat16_loses_precision_in_products_only():
    """Small integers, whose logits are exact in bfloat16: what follows them must be as exact as in float32."""
    call = head_examples.inputs(TOKENS, HIDDEN, VOCABULARY)
    call.hidden, call.weight = (x.round().clamp(-2, 2).bfloat16() for x in (call.hidden, call.weight))
    found, expected = head_examples.chunked(call, 7), head_examples.exact(call)
    for name in ("log_probs", "entropy"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), atol=1e-5, rtol=1e-6)
    for name in ("grad_hidden", "grad_weight"):
        gradient, goal = getattr(found, name), getattr(expected, name)
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - goal).norm() < 4e-3 * goal.norm()


def test_bfloat16_sums_the_weight_gradient_in_float32():
    """Were the sum over chunks kept in bfloat16, many chunks would lose digits."""
    call = head_examples.inputs(500, HIDDEN, 211)
    call.hidden, call.weight = call.hidden.bfloat16(), call.weight.bfloat16()
    many, one = (head_examples.chunked(call, chunk_tokens).grad_weight.float() for chunk_tokens in (5, 500))
    assert (many - one).norm() < 4e-3 * one.norm()


def test_bfloat16_sums_the_hidden_gradient_in_float32():
    """The label's large part comes with the first of many blocks; in bfloat16 the others' small parts would be lost."""
    call = head_examples.inputs(9, HIDDEN, 40 * BLOCK_ROWS)
    call.hidden, call.weight = (x.round().clamp(-2, 2).bfloat16() for x in (call.hidden, call.weight))
    call.labels.zero_()
    goal = head_examples.exact(call, with_entropy=False).grad_hidden
    found = head_examples.chunked(call, 9, with_entropy=False).grad_hidden
    assert (found.double() - goal).norm() < 4e-3 * goal.norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tensor_grows_with_tokens_times_vocabulary(with_entropy):
    tokens, chunk_tokens = 100, 30
    call = head_examples.inputs(tokens, HIDDEN, VOCABULARY)
    hidden, weight = call.hidden.requires_grad_(), call.weight.requires_grad_()
    with LargestTensor() as plain:
        (hidden @ weight.T).log_softmax(-1).gather(1, call.labels[:, None]).sum().backward()
    assert plain.elements == tokens * VOCABULARY
    with LargestTensor() as largest:
        head_examples.chunked(call, chunk_tokens, with_entropy)
    assert largest.elements == HIDDEN * VOCABULARY < chunk_tokens * VOCABULARY  # the weight's gradient
