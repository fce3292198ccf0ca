"""Token log-probs through the chunked head equal a plain log_softmax, without the plain one's memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vespo.policy.head import token_log_probs

TOKENS, HIDDEN, VOCABULARY = 29, 16, 211


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    return hidden, weight, labels, upstream


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient(chunk_tokens, temperature):
    hidden, weight, labels, upstream = inputs()
    found = token_log_probs(hidden, weight, labels, temperature, chunk_tokens)
    found.backward(upstream)

    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    scores = (exact_hidden @ exact_weight.T / temperature).log_softmax(-1)
    expected = scores.gather(1, labels[:, None]).squeeze(1)
    expected.backward(upstream.double())

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=1e-5, rtol=1e-5)


def test_bfloat16_sums_the_weight_gradient_in_float32():
    hidden, weight, labels, upstream = inputs(torch.bfloat16)
    gradients = {}
    for chunk_tokens in (2, TOKENS):
        weight.grad = None
        token_log_probs(hidden, weight, labels, 1.0, chunk_tokens).backward(upstream)
        assert weight.grad.dtype == torch.bfloat16
        gradients[chunk_tokens] = weight.grad.float()
    assert (gradients[2] - gradients[TOKENS]).norm() < 4e-3 * gradients[TOKENS].norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_no_tensor_grows_with_tokens_times_vocabulary():
    hidden, weight, labels, upstream = inputs()
    with LargestTensor() as plain:
        (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1).backward(upstream)
    assert plain.elements == TOKENS * VOCABULARY
    with LargestTensor() as chunked:
        token_log_probs(hidden, weight, labels, 1.0, 4).backward(upstream)
    assert chunked.elements == HIDDEN * VOCABULARY  # the weight's gradient
