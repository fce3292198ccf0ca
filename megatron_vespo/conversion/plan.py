"""Small things that both directions of a conversion share."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import padded_vocabulary, require_fit
from megatron_vespo.config import LayoutConfig, PolicyConfig

BLOCK_BYTES = 256 * 1024**2
"""Larger tensors are read and written in blocks of rows: this bounds a process's memory, and not the tensors' size."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_layout(architecture: Architecture, layout: LayoutConfig, vocabulary_multiple: int) -> int:
    """Rows of the vocabulary, filled up as a policy of this layout does. Raises ConfigError if it does not fit the model."""
    policy = PolicyConfig(ranks=fewest_ranks(layout), layout=layout, vocabulary_multiple=vocabulary_multiple)
    require_fit(architecture, policy)
    return padded_vocabulary(architecture, policy)


def fewest_ranks(layout: LayoutConfig) -> int:
    """That can have `layout`."""
    return layout.pp * math.lcm(layout.tp, layout.etp * layout.ep)


def fingerprint(described: object, files: Iterable[Path]) -> str:
    """Of a source: what its metadata say (JSON), and size and time of change of its files."""
    stats = {file.name: (stat.st_size, stat.st_mtime_ns) for file in sorted(set(files)) if (stat := file.stat())}
    return xxhash.xxh3_128_hexdigest(json.dumps([described, stats], sort_keys=True).encode())


def row_blocks(rows: int, row_bytes: int, shares: int = 1) -> list[slice]:
    """`rows` cut into `shares` of equal length, and these into blocks of at most BLOCK_BYTES."""
    share = rows // shares
    step = max(1, min(share, BLOCK_BYTES // max(1, row_bytes)))
    return [
        slice(start, min(start + step, first + share))
        for first in range(0, rows, share)
        for start in range(first, first + share, step)
    ]


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals itself here, and 0 does not equal -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
