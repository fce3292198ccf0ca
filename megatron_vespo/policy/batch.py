"""What the trainer sees of trajectories: packed micro-batches, in plain tensors.

A packed sequence of a trajectory with P prompt and R response tokens has P + R - 1 positions: position i holds token i
as input and token i + 1 as label. The last token is only a label. Engine routing rows come in the same shape.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class TrainingSequence:
    """One trajectory or demonstration, before packing. `n` = prompt + response tokens.

    Attributes:
        token_ids: [n] int32 or int64.
        label_mask: [n - 1] bool, position i is True where token i + 1 counts in the loss.
        old_log_probs: [n - 1] float32, of token i + 1 under the old policy; anything where label_mask is False.
        advantage: of the whole sequence; 1.0 for demonstrations.
        key: position in the step's mini-batch; results are ordered by it.
    """

    token_ids: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    old_log_probs: NDArray[np.float32]
    advantage: float
    key: int

    def __post_init__(self):
        n = len(self.token_ids) - 1
        if n < 1 or len(self.label_mask) != n or len(self.old_log_probs) != n:
            raise ValueError(
                f"sequence {self.key}: {n + 1} tokens need {n} label_mask and old_log_probs entries, "
                f"found {len(self.label_mask)} and {len(self.old_log_probs)}"
            )

    def with_key(self, key: int) -> "TrainingSequence":
        return replace(self, key=key)


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences of one forward/backward pass on one rank. `t` = positions, `s` = sequences.

    A micro-batch that only fills up a schedule has one sequence with nothing in its label_mask and key -1.
    """

    input_ids: torch.Tensor  # [t] int64
    labels: torch.Tensor  # [t] int64
    position_ids: torch.Tensor  # [t] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [s + 1] int32
    label_mask: torch.Tensor  # [t] bool
    old_log_probs: torch.Tensor  # [t] float32
    advantages: torch.Tensor  # [s] float32
    keys: tuple[int, ...]  # s of them

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())


def pack(sequences: list[TrainingSequence]) -> MicroBatch:
    """Put sequences behind each other, in the given order."""
    lengths = [len(s.token_ids) - 1 for s in sequences]
    tokens = [torch.as_tensor(np.asarray(s.token_ids, dtype=np.int64)) for s in sequences]
    return MicroBatch(
        input_ids=torch.cat([t[:-1] for t in tokens]),
        labels=torch.cat([t[1:] for t in tokens]),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        label_mask=torch.cat([torch.as_tensor(s.label_mask, dtype=torch.bool) for s in sequences]),
        old_log_probs=torch.cat([torch.as_tensor(s.old_log_probs, dtype=torch.float32) for s in sequences]),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        keys=tuple(s.key for s in sequences),
    )
