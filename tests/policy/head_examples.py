"""Inputs of the output head, what it must give in float64, and what two ranks are asked to compute with it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from megatron_vespo.policy.head import token_scores

TOLERANCES = {"log_probs": 1e-5, "entropy": 1e-5, "grad_hidden": 4e-5, "grad_weight": 4e-5}


@dataclass
class Inputs:
    """One call, and the gradients that come back to its two outputs."""

    hidden: Tensor  # [t, h]
    weight: Tensor  # [v, h], from vocab_size on padding
    labels: Tensor  # [t]
    vocab_size: int
    grad_log_probs: Tensor  # [t]
    grad_entropy: Tensor  # [t]
    temperature: float = 1.0


@dataclass
class Scores:
    """What came of it. Entropy is None where it was not asked for."""

    log_probs: Tensor  # [t]
    entropy: Tensor | None  # [t]
    grad_hidden: Tensor  # [t, h]
    grad_weight: Tensor  # [v, h]
    collectives: int = 0


def inputs(
    tokens: int, hidden: int, vocab_size: int, padded: int | None = None, padding: float = 1e30, **fields
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(padded or vocab_size, hidden, generator=generator)
    weight[vocab_size:] = padding
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    labels[:2] = torch.tensor([0, vocab_size - 1])
    return Inputs(
        torch.randn(tokens, hidden, generator=generator),
        weight,
        labels,
        vocab_size,
        torch.randn(tokens, generator=generator),
        torch.randn(tokens, generator=generator),
        **fields,
    )


def exact(call: Inputs, with_entropy: bool = True) -> Scores:
    """Plain float64, of real rows only."""
    hidden, weight = (x.double().requires_grad_() for x in (call.hidden, call.weight[: call.vocab_size]))
    distribution = torch.distributions.Categorical(logits=hidden @ weight.T / call.temperature)
    log_probs, entropy = distribution.log_prob(call.labels), distribution.entropy()
    loss = log_probs @ call.grad_log_probs.double()
    if with_entropy:
        loss = loss + entropy @ call.grad_entropy.double()
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    padding = torch.zeros(len(call.weight) - call.vocab_size, weight.shape[1], dtype=torch.float64)
    return Scores(log_probs.detach(), entropy.detach(), grad_hidden, torch.cat([grad_weight, padding]))


def chunked(
    call: Inputs, chunk_tokens: int, with_entropy: bool = True, group: dist.ProcessGroup | None = None
) -> Scores:
    hidden, weight = (x.clone().requires_grad_() for x in (call.hidden, call.weight))
    with CommDebugMode() as communication:
        log_probs, entropy = token_scores(
            hidden,
            weight,
            call.labels,
            temperature=call.temperature,
            chunk_tokens=chunk_tokens,
            vocab_size=call.vocab_size,
            group=group,
            with_entropy=with_entropy,
        )
        outputs = (log_probs,) if entropy is None else (log_probs, entropy)
        upstream = (call.grad_log_probs, call.grad_entropy)[: len(outputs)]
        grad_hidden, grad_weight = torch.autograd.grad(outputs, (hidden, weight), upstream)
    entropy = None if entropy is None else entropy.detach()
    return Scores(log_probs.detach(), entropy, grad_hidden, grad_weight, communication.get_total_counts())


def chunked_on_rank(
    rank: int, world_size: int, port: int, call: Inputs, chunk_tokens: int, with_entropy: bool
) -> Scores:
    """`call` has the whole weight; each rank takes its rows."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        call.weight = call.weight.chunk(world_size)[rank]
        return chunked(call, chunk_tokens, with_entropy, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def assert_close(found: Scores, expected: Scores, with_entropy: bool = True) -> None:
    """To what a plain softmax in float32 reaches on these inputs: entropy's gradient of up to 11 is off by 2e-5."""
    for name, tolerance in TOLERANCES.items():
        value, goal = getattr(found, name), getattr(expected, name)
        if name == "entropy" and not with_entropy:
            continue
        assert value.dtype == torch.float32
        difference = (value.double() - goal).abs().max().item()
        assert difference <= tolerance, f"{name} is off by {difference}"
