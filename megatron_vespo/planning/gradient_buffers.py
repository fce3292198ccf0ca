"""Megatron-Core's gradient buffers and what of the optimizer's state each data-parallel rank holds, from sizes alone.

Follows `megatron/core/distributed/param_and_grad_buffer.py`, `distributed_data_parallel.py` and
`optimizer/distrib_optimizer.py` of 0.16.1: parameters lie in reverse order; with the distributed optimizer each begins
at a multiple of 64 elements, each bucket is padded to a multiple of lcm(data-parallel ranks, 128), and a rank steps its
share of each bucket, wherever that cuts parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vespo.config import PolicyConfig
from megatron_vespo.planning.parameters import Parameter

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
SMALLEST_BUCKET = 40_000_000
BUCKET_PER_RANK = 1_000_000
"""Elements; of overlapped reduction only."""


@dataclass(frozen=True)
class GradientBuffer:
    """Of parameters that are reduced together.

    Attributes:
        elements: with padding.
        buckets: bounds of each.
        spans: bounds of each parameter.
        ranks: over which it is reduced.
    """

    elements: int
    buckets: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    ranks: int

    def stepped_by(self, rank: int) -> int:
        """Elements of parameters that the distributed optimizer steps on the `rank`-th of the data-parallel ranks."""
        total = 0
        for start, end in self.buckets:
            share = (end - start) // self.ranks
            low, high = start + rank * share, start + (rank + 1) * share
            total += sum(max(0, min(high, b) - max(low, a)) for a, b in self.spans)
        return total


def bucket_size(policy: PolicyConfig, stage: int, chunk: int) -> int | None:
    """Elements from which a new bucket is begun; None: all are in one."""
    if not policy.overlap_gradient_reduction or stage > 0 or chunk > 0:
        return None
    return max(SMALLEST_BUCKET, BUCKET_PER_RANK * policy.data_parallel_size)


def chunk_buffers(
    parameters: Sequence[Parameter], policy: PolicyConfig, stage: int, chunk: int
) -> tuple[GradientBuffer | None, GradientBuffer | None]:
    """Of what all data-parallel ranks have alike, and of experts that have others; None where there are none."""
    layout = policy.layout
    size = bucket_size(policy, stage, chunk)
    buffers = []
    for apart, ranks in (
        (False, policy.ranks // (layout.tp * layout.pp)),
        (True, policy.ranks // layout.expert_model_ranks),
    ):
        own = [parameter for parameter in parameters if parameter.expert_parallel is apart]
        buffers.append(_lay_out(own, ranks, policy.distributed_optimizer, size) if own else None)
    return buffers[0], buffers[1]


def _lay_out(parameters: Sequence[Parameter], ranks: int, distributed: bool, size: int | None) -> GradientBuffer:
    bucket_multiple = math.lcm(ranks, BUCKET_ALIGNMENT) if distributed else 1
    parameter_multiple = PARAMETER_ALIGNMENT if distributed else 1
    buckets: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    bucket_start = position = 0
    filling = False

    def close(end: int) -> int:
        nonlocal bucket_start, filling
        end = _padded(end, bucket_multiple)
        buckets.append((bucket_start, end))
        bucket_start, filling = end, False
        return end

    for parameter in reversed(parameters):
        alone = parameter.own_bucket and distributed
        position = _padded(position, parameter_multiple)
        if alone and filling:
            position = close(position)
        end = position + parameter.elements
        spans.append((position, end))
        filling = True
        full = size is not None and end - bucket_start >= size
        position = close(end) if full or alone else end
    if filling:
        close(position)
    return GradientBuffer(bucket_start, tuple(buckets), tuple(spans), ranks)


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
