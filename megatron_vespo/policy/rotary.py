"""Rotary positions of packed sequences on a CPU: what Megatron-Core computes without fused kernels, in fewer passes."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vespo.policy.batch import context_order


def rotate_packed(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: ProcessGroup | None = None,
) -> Tensor:
    """Takes the place of `rope_utils._apply_rotary_pos_emb_thd` of Megatron-Core 0.16.1: the same but for rounding.

    Args:
        t: [t, heads, d], with context parallelism this rank's rows.
        cu_seqlens: [s + 1], bounds of the whole sequences.
        freqs: [longest, 1, 1, d], each position's angles; the second half of them equals the first.
        cp_group: the context-parallel ranks.

    Returns:
        [t, heads, d]: of each head's halves (a, b), (a cos - b sin, b cos + a sin), times `mscale`.

    Raises:
        ValueError: pairs are arranged in another way than halves of whole heads.
    """
    if rotary_interleaved or multi_latent_attention or freqs.shape[-1] != t.shape[-1] or cp_group is None:
        raise ValueError("rotary positions are computed here for halves of whole heads, and with a cp_group")
    cosine, signed_sine = _of_rows(freqs, cu_seqlens, cp_group.size(), cp_group.rank(), mscale, t.dtype)
    return torch.addcmul(t * cosine, t.roll(t.shape[-1] // 2, dims=-1), signed_sine)


@lru_cache(maxsize=1)  # all layers ask for the same one after the other; tensors are told apart by identity
def _of_rows(
    freqs: Tensor, cu_seqlens: Tensor, ranks: int, rank: int, mscale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of each of a rank's rows, [t, 1, d] each, the sine's first half negated."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff() // ranks)
    rows = torch.arange(len(starts)) if ranks == 1 else context_order(cu_seqlens, ranks)[rank]
    angles = freqs.squeeze(1)
    sine = angles.sin()
    sine[..., : sine.shape[-1] // 2].neg_()
    cosine, sine = ((x * mscale).to(dtype)[rows - starts] for x in (angles.cos(), sine))
    return cosine, sine
