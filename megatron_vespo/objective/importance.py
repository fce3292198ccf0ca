"""Importance weights, in log space."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.objective.packed import Packed, over_group

LARGEST_LOG_RATIO = 30.0
"""Ratios are held to e^30 where they are exponentiated (their logs never are): so loss, gradient and the square of the
gradient's norm stay finite in float32. The published code holds them to e^20."""


def wide_enough(*values: Tensor) -> torch.dtype:
    """float32, or float64 if one of them is."""
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def log_ratio(log_probs: Tensor, old_log_probs: Tensor, packed: Packed) -> Tensor:
    """log(current / old) of each response token, 0 elsewhere: [t] -> [t] float32 (float64 if an input is), detached."""
    dtype = wide_enough(log_probs, old_log_probs)
    return packed.zero_outside_(log_probs.detach().to(dtype) - old_log_probs.detach().to(dtype))


def ratio(log_ratio: Tensor) -> Tensor:
    """exp, held to e^LARGEST_LOG_RATIO."""
    return torch.exp(log_ratio.clamp(max=LARGEST_LOG_RATIO))


def sequence_log_weight(
    log_probs: Tensor,
    old_log_probs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """log W of each response: sum over its tokens of log(current / old policy). [t] -> [s] float64, detached.

    A product over the whole response, never length-normalised and never clamped per token (VESPO, arXiv 2602.10693).
    `group`: ranks among which the positions of each sequence are dealt out (context parallelism).
    """
    packed = Packed(response_mask, cu_seqlens)
    return over_group(packed.sum(log_ratio(log_probs, old_log_probs, packed)), group)


class NotFiniteError(ValueError):
    """A log-prob that no policy can have given to a token that was sampled.

    `sequence`: index in the packed batch. `found`: what was found there.
    """

    def __init__(self, sequence: int, found: list[str], of: str = "this batch") -> None:
        super().__init__(f"trajectory {sequence} of {of}: " + (", ".join(found) or "log-probs are not finite"))
        self.sequence = sequence
        self.found = found

    def in_step(self, key: int) -> "NotFiniteError":
        """The same of the whole step, where the trajectory's number is `key`."""
        return NotFiniteError(key, self.found, of="this step")


def require_finite(log_weight: Tensor, packed: Packed, **log_probs: Tensor) -> None:
    """Check `log_weight` [s], sums over sequences, instead of all tokens of the `log_probs` [t] that they came from.

    Under context parallelism all ranks of a sequence have the same sums, so all raise and none waits for another.

    Raises:
        NotFiniteError: names the first sequence whose sum is not finite, and what was found in it.
    """
    finite = torch.isfinite(log_weight)
    if finite.all():
        return
    sequence = int((~finite).nonzero()[0])
    inside = slice(int(packed.cu_seqlens[sequence]), int(packed.cu_seqlens[sequence + 1]))
    found = []
    for name, values in log_probs.items():
        responses = values[inside][packed.response_mask[inside]].detach()
        wrong = (~torch.isfinite(responses)).nonzero().flatten()
        if len(wrong):
            found.append(f"{name} of its response token {int(wrong[0])} is {float(responses[wrong[0]])}")
    raise NotFiniteError(sequence, found)
