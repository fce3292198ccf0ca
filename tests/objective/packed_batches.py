"""Random packed batches, and TRL's function, for the tests of the objective."""

import ast
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective import LossMetrics, policy_loss

LENGTHS = (3, 1, 7, 4, 9, 2)


@dataclass(frozen=True)
class Batch:
    """As `policy_loss` takes it: [t] tokens of len(lengths) sequences."""

    lengths: tuple[int, ...]
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    response_mask: Tensor

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)

    def bounds(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.cu_seqlens.tolist()))

    def to(self, dtype: torch.dtype) -> "Batch":
        return replace(
            self,
            log_probs=self.log_probs.to(dtype),
            old_log_probs=self.old_log_probs.to(dtype),
            advantages=self.advantages.to(dtype),
        )

    def with_token_advantages(self, seed: int = 7) -> "Batch":
        generator = torch.Generator().manual_seed(seed)
        return replace(self, advantages=torch.randn(sum(self.lengths), generator=generator, dtype=torch.float64))

    def taken(self, order: list[int]) -> "Batch":
        """Some of its sequences, in another order."""
        bounds = self.bounds()
        positions = torch.tensor([t for i in order for t in range(*bounds[i])], dtype=torch.long)
        per_sequence = len(self.advantages) == len(self.lengths)
        return Batch(
            tuple(self.lengths[i] for i in order),
            self.log_probs[positions],
            self.old_log_probs[positions],
            self.advantages[torch.tensor(order, dtype=torch.long) if per_sequence else positions],
            self.response_mask[positions],
        )


def batch(
    seed: int = 0, lengths: tuple[int, ...] = LENGTHS, spread: float = 0.3, dtype: torch.dtype = torch.float64
) -> Batch:
    """`spread`: standard deviation of the log-ratio of a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    log_probs = -torch.rand(tokens, generator=generator, dtype=torch.float64) * 3
    old = log_probs + spread * torch.randn(tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(tokens, generator=generator) > 0.3
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return Batch(lengths, log_probs, old, advantages, mask).to(dtype)


def loss_and_gradient(config: ObjectiveConfig, data: Batch, **further) -> tuple[Tensor, Tensor, LossMetrics]:
    log_probs = data.log_probs.detach().clone().requires_grad_()
    loss, metrics = policy_loss(
        config,
        log_probs=log_probs,
        old_log_probs=data.old_log_probs,
        advantages=data.advantages,
        response_mask=data.response_mask,
        cu_seqlens=data.cu_seqlens,
        **further,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, metrics


def padded(values: Tensor, data: Batch, fill: float = 0.0) -> Tensor:
    rows = [values[a:b] for a, b in data.bounds()]
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
