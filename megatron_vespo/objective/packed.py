"""Sequences behind each other in tensors of tokens, and which of those tokens count."""

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


class Packed:
    """t positions of s sequences. Nothing here is differentiable; everything repeats exactly on every device.

    Under context parallelism these are this rank's positions of each sequence, and so are all sums until
    `over_group` adds them up.

    Attributes:
        response_mask: [t] bool, True on labels that are response tokens.
        cu_seqlens: [s + 1] int32, bounds of the sequences.
        positions: [s] int32, positions of each sequence.
    """

    def __init__(self, response_mask: Tensor, cu_seqlens: Tensor) -> None:
        self.response_mask = response_mask
        self.cu_seqlens = cu_seqlens
        self.positions = (cu_seqlens[1:] - cu_seqlens[:-1]).int()
        self._bits: dict[torch.dtype, Tensor] = {}

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each sequence over all its positions: [t] -> [s] float64."""
        return torch.segment_reduce(values.detach().double(), "sum", lengths=self.positions.long())

    @cached_property
    def lengths(self) -> Tensor:
        """Response tokens of each sequence: [s] float64, exact."""
        running = torch.cumsum(self.response_mask, 0, dtype=torch.int32)
        last = self.cu_seqlens.long() - 1
        before = torch.where(last < 0, 0, running[last.clamp(min=0)])
        return (before[1:] - before[:-1]).double()

    def spread(self, values: Tensor) -> Tensor:
        """Give each position the value of its sequence: [s] -> [t]."""
        return torch.repeat_interleave(values, self.positions, output_size=len(self.response_mask))

    def zero_outside_(self, values: Tensor) -> Tensor:
        """In place, 0 outside response tokens, even where `values` is not finite: [t] float32 or float64, no gradient.

        What `masked_fill_` with the mask's opposite does; on a CPU that takes ten times as long.
        """
        integer = torch.int32 if values.dtype == torch.float32 else torch.int64
        if integer not in self._bits:
            self._bits[integer] = self.response_mask.to(integer).neg_()
        values.view(integer).bitwise_and_(self._bits[integer])
        return values

    def responses(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A detached copy in `dtype`, 0 outside response tokens: [t] -> [t]."""
        return self.zero_outside_(values.detach().to(dtype, copy=True))


def over_group(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Added up, in place, over the ranks among which the positions of each sequence are dealt out; all of them call."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums
