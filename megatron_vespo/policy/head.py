"""Log-probabilities of given tokens from hidden states, without ever holding the logits of all of them."""

from typing import Any

import torch
from torch import Tensor


def token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_tokens: int) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at `labels`, differentiable in `hidden` and `weight`.

    Logits are computed in the dtype of `hidden`, everything after them in float32. Logits of `chunk_tokens` tokens exist
    at a time, in the forward and (recomputed) in the backward pass.

    Args:
        hidden: [t, h]; weight: [v, h], of the same dtype.
        labels: [t] int64, from 0 to v - 1.
        temperature: of sampling, > 0.

    Returns:
        [t] float32.
    """
    return _TokenLogProbs.apply(hidden, weight, labels, temperature, chunk_tokens)  # type: ignore[return-value]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_tokens: int
    ) -> Tensor:
        log_probs = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(log_probs)
        for chunk in _chunks(len(labels), chunk_tokens):
            logits = _scaled_logits(hidden[chunk], weight, temperature)
            normaliser[chunk] = logits.logsumexp(dim=-1)
            log_probs[chunk] = logits.gather(1, labels[chunk, None]).squeeze(1) - normaliser[chunk]
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """With p the softmax: d log_prob / d logit_j = (1[j = label] - p_j) / temperature."""
        hidden, weight, labels, normaliser = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        # In float32, whatever the weight's dtype, so that the sum does not depend on the number of chunks.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for chunk in _chunks(len(labels), ctx.chunk_tokens):
            grad_logits = _scaled_logits(hidden[chunk], weight, ctx.temperature)
            grad_logits.sub_(normaliser[chunk, None]).exp_().mul_(-scale[chunk, None])
            grad_logits.scatter_add_(1, labels[chunk, None], scale[chunk, None])
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
            else:
                grad_weight.add_(grad_logits.T @ hidden[chunk])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """A new float32 tensor, [t, v]."""
    return (hidden @ weight.T).float().div_(temperature)


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]
