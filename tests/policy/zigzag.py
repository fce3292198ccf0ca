"""Megatron's order of context-parallel rows, counted out: the independent computation."""

import torch
from torch import Tensor


def rows_of(rank: int, ranks: int, lengths: list[int]) -> Tensor:
    """Of 2c chunks of each sequence, rank r has chunk r and then chunk 2c - 1 - r: packed positions, [t / c]."""
    rows, start = [], 0
    for length in lengths:
        chunk = length // (2 * ranks)
        for number in (rank, 2 * ranks - 1 - rank):
            rows += range(start + number * chunk, start + (number + 1) * chunk)
        start += length
    return torch.tensor(rows)
