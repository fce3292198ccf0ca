"""What the trainer sees of trajectories: packed micro-batches, in plain tensors.

A packed sequence of a trajectory with P prompt and R response tokens has P + R - 1 positions: position i holds token i
as input and token i + 1 as label. The last token is only a label. Engine routing rows come in the same shape.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TrainingSequence:
    """One trajectory or demonstration, before packing. `n` = prompt + response tokens.

    Attributes:
        token_ids: [n] int32 or int64.
        label_mask: [n - 1] bool, position i is True where token i + 1 counts in the loss.
        old_log_probs: [n - 1] float32, of token i + 1 under the old policy; anything where label_mask is False.
        engine_log_weights: [n - 1] float32, log of the correction of the engine's error of token i + 1, or None.
        reference_log_probs: [n - 1] float32, of token i + 1 under the frozen reference, or None.
        advantage: of the whole sequence; 1.0 for demonstrations.
        key: position in the step's mini-batch; results are ordered by it.
    """

    token_ids: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    old_log_probs: NDArray[np.float32]
    advantage: float
    key: int
    engine_log_weights: NDArray[np.float32] | None = None
    reference_log_probs: NDArray[np.float32] | None = None

    def __post_init__(self):
        n = self.positions
        if n < 1 or len(self.label_mask) != n or len(self.old_log_probs) != n:
            raise ValueError(
                f"sequence {self.key}: {n + 1} tokens need {n} label_mask and old_log_probs entries, "
                f"found {len(self.label_mask)} and {len(self.old_log_probs)}"
            )

    @property
    def positions(self) -> int:
        return len(self.token_ids) - 1

    def with_key(self, key: int) -> "TrainingSequence":
        return replace(self, key=key)


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences of one forward/backward pass on one rank. `t` = positions, `s` = sequences.

    Sequence j has the positions from cu_seqlens[j] on: lengths[j] real ones, then padding up to cu_seqlens[j + 1]. In
    padding the ids are some token of the vocabulary, positions go on counting, nothing is in label_mask, and
    old_log_probs are 0. It stands behind a causal sequence, so it changes nothing in front of it.

    A filler is a sequence of key -1 with nothing in its label_mask: it only makes the number of positions, or of
    micro-batches, what the layout needs.
    """

    input_ids: Tensor  # [t] int64
    labels: Tensor  # [t] int64
    position_ids: Tensor  # [t] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [s + 1] int32, bounds with padding
    label_mask: Tensor  # [t] bool
    old_log_probs: Tensor  # [t] float32
    advantages: Tensor  # [s] float32
    keys: tuple[int, ...]  # s of them
    lengths: tuple[int, ...]  # s of them, positions without padding
    engine_log_weights: Tensor | None = None  # [t] float32
    reference_log_probs: Tensor | None = None  # [t] float32

    @property
    def max_seqlen(self) -> int:
        """With padding."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def context_slice(self, rank: int, size: int) -> "MicroBatch":
        """What context-parallel rank `rank` of `size` holds of every sequence: see `context_order`.

        Position ids remain those in the whole sequence. Bounds and lengths are those of the slice, whose real positions
        come first too; a length may be 0. (Megatron and Transformer Engine want the bounds of the whole, and divide.)
        """
        if size == 1:
            return self
        own = context_order(self.cu_seqlens, size)[rank].to(self.input_ids.device)
        chunks = self.cu_seqlens.diff() // (2 * size)
        first, second = (
            (torch.tensor(self.lengths) - number * chunks.cpu()).clamp(min=0).minimum(chunks.cpu())
            for number in (rank, 2 * size - 1 - rank)
        )
        return replace(
            self,
            input_ids=self.input_ids[own],
            labels=self.labels[own],
            position_ids=self.position_ids[own],
            cu_seqlens=self.cu_seqlens // size,
            label_mask=self.label_mask[own],
            old_log_probs=self.old_log_probs[own],
            lengths=tuple((first + second).tolist()),
            engine_log_weights=None if self.engine_log_weights is None else self.engine_log_weights[own],
            reference_log_probs=None if self.reference_log_probs is None else self.reference_log_probs[own],
        )


def pack(sequences: list[TrainingSequence], segment_multiple: int = 1) -> MicroBatch:
    """Put sequences behind each other, in the given order, each padded at its end to a multiple of positions."""
    lengths = [sequence.positions for sequence in sequences]
    padding = [-length % segment_multiple for length in lengths]
    padded = [length + more for length, more in zip(lengths, padding, strict=True)]
    counting = np.arange(max(padded))
    return MicroBatch(
        input_ids=_joined([sequence.token_ids[:-1] for sequence in sequences], padding).long(),
        labels=_joined([sequence.token_ids[1:] for sequence in sequences], padding).long(),
        position_ids=torch.from_numpy(np.concatenate([counting[:length] for length in padded])),
        cu_seqlens=torch.tensor([0, *np.cumsum(padded)], dtype=torch.int32),
        label_mask=_joined([sequence.label_mask for sequence in sequences], padding).bool(),
        old_log_probs=_joined([sequence.old_log_probs for sequence in sequences], padding).float(),
        advantages=torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32),
        keys=tuple(sequence.key for sequence in sequences),
        lengths=tuple(lengths),
        engine_log_weights=_given([sequence.engine_log_weights for sequence in sequences], padding),
        reference_log_probs=_given([sequence.reference_log_probs for sequence in sequences], padding),
    )


def _given(parts: list[NDArray[np.float32] | None], padding: list[int]) -> Tensor | None:
    """All sequences have it, or none. Raises ValueError if some do."""
    given = [part for part in parts if part is not None]
    if len(given) not in (0, len(parts)):
        raise ValueError(
            f"{len(given)} of {len(parts)} sequences have log-probs of another policy: all need them, or none"
        )
    return _joined(given, padding).float() if given else None


def _joined(parts: list[NDArray], padding: list[int]) -> Tensor:
    """Behind each other, with so many zeros after each."""
    zeros = np.zeros(max(padding), dtype=parts[0].dtype)
    if len(zeros):
        parts = [piece for part, count in zip(parts, padding, strict=True) for piece in (part, zeros[:count])]
    return torch.from_numpy(np.concatenate(parts))


def context_order(cu_seqlens: Tensor, size: int) -> Tensor:
    """Positions that each of `size` context-parallel ranks holds, in its order: [s + 1] -> [size, t / size] int64.

    Each sequence is cut into 2 * size chunks, and rank r holds chunk r and behind it chunk 2 * size - 1 - r, so that
    all have as much causal attention to do. As Megatron-Core's `get_batch_on_this_cp_rank` has it for one sequence, and
    its rotary embedding (`_get_thd_freqs_on_this_cp_rank`) and Transformer Engine for packed ones.

    Raises:
        ValueError: the length of a sequence, with padding, is not a multiple of 2 * size.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if bool((lengths % (2 * size)).any()):
        raise ValueError(
            f"context parallelism over {size} ranks needs sequences padded to multiples of {2 * size} positions, "
            f"found {lengths.tolist()}"
        )
    chunks = lengths // (2 * size)
    start, chunk, own_start = (x.repeat_interleave(2 * chunks) for x in (starts, chunks, starts // size))
    within = torch.arange(len(chunk), device=cu_seqlens.device) - own_start
    rank = torch.arange(size, device=cu_seqlens.device)[:, None]
    behind = within >= chunk
    number = torch.where(behind, 2 * size - 1 - rank, rank)
    return start + number * chunk + within - behind * chunk


def context_gather(parts: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """The inverse of `MicroBatch.context_slice` for what was computed of it, in packed order.

    Args:
        parts: [t / size, ...] of every context-parallel rank, in the order of the ranks. Differentiable.
        cu_seqlens: of the whole micro-batch.

    Returns:
        [t, ...]
    """
    if len(parts) == 1:
        return parts[0]
    order = context_order(cu_seqlens, len(parts)).flatten()
    return torch.cat(parts)[order.argsort().to(parts[0].device)]
