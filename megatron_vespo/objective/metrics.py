"""What an objective tells beside its loss, in a form that reduces exactly over ranks and micro-batches."""

from dataclasses import dataclass, field

import torch


@dataclass
class LossMetrics:
    """Detached tensors.

    `sums`: scalars that add up over ranks and micro-batches (a mean is a sum and a count, divided at the end).
    `sequences`: one value per packed sequence, [s] float32, in the order of `cu_seqlens`; concatenated, then ordered by
    the sequences' keys, so quantiles are exact.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    sequences: dict[str, torch.Tensor] = field(default_factory=dict)
