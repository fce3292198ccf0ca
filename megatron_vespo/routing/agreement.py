"""How recorded routes agree with the trainer's own choice, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SUMS = ("rows", "same_set", "same_slots", "overlap", "margin")
"""The first columns of `LayerSums.values`; behind them is the load of each expert."""


class LayerSums:
    """Of one MoE layer, over the recorded rows of a pass.

    Attributes:
        values: [len(SUMS) + experts] float64, see `add`.
    """

    def __init__(self, num_experts: int):
        self.values = torch.zeros(len(SUMS) + num_experts, dtype=torch.float64)

    @torch.no_grad()
    def add(self, recorded: Tensor, own: Tensor, rows: Tensor, scores: Tensor) -> None:
        """
        Args:
            recorded: [n, topk] int64, experts as recorded.
            own: [n, topk] int64, experts as the router would choose them.
            rows: [n] bool, those that are recorded.
            scores: [n, experts] that `own` is the top of.

        Adds: recorded rows; those with the same experts; those with the same in the same slots; the sum over rows of the
        share of experts in common; the sum, over rows with other experts, of the margin by which the router decided (the
        k-th score less the next); and how many recorded slots each expert has.
        """
        if self.values.device != scores.device:
            self.values = self.values.to(scores.device)
        topk, experts = recorded.shape[1], scores.shape[1]
        common = (recorded[:, :, None] == own[:, None, :]).any(2).sum(1)
        same_set = rows & (common == topk)
        same_slots = rows & (recorded == own).all(1)
        sums = [rows.sum(), same_set.sum(), same_slots.sum(), (common * rows).sum() / topk]
        margin = scores.new_zeros(())
        if topk < experts:
            best = scores.float().topk(topk + 1, dim=1).values
            margin = ((best[:, topk - 1] - best[:, topk]) * (rows & ~same_set)).sum()
        load = torch.zeros(experts, dtype=torch.float64, device=scores.device)
        load.index_add_(0, recorded.flatten(), rows.double().repeat_interleave(topk))
        self.values += torch.cat([torch.stack([value.double() for value in [*sums, margin]]), load])


@dataclass(frozen=True)
class Agreement:
    """Shares of recorded rows, of every MoE layer: [layers] float64; nan where a layer has no recorded row.

    Attributes:
        rows: recorded rows.
        same_set: with the same experts as the trainer's own choice.
        same_slots: with the same experts in the same order.
        overlap: mean share of experts in common.
        margin: mean of what the router preferred its last expert to the next by, over rows with other experts, in units
            of its scores; nan where there are none.
        largest_load: the busiest expert's recorded slots over the mean of all experts; 1 is balanced.
        unused: share of experts without a recorded slot.
    """

    rows: NDArray[np.float64]
    same_set: NDArray[np.float64]
    same_slots: NDArray[np.float64]
    overlap: NDArray[np.float64]
    margin: NDArray[np.float64]
    largest_load: NDArray[np.float64]
    unused: NDArray[np.float64]


def agreement(sums: Tensor) -> Agreement:
    """From `LayerSums.values` of every layer, added over ranks: [layers, len(SUMS) + experts]."""
    values = sums.double().numpy()
    rows, same_set, same_slots, overlap, margin = values[:, : len(SUMS)].T
    load = values[:, len(SUMS) :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return Agreement(
            rows=rows,
            same_set=same_set / rows,
            same_slots=same_slots / rows,
            overlap=overlap / rows,
            margin=margin / (rows - same_set),
            largest_load=load.max(1) / load.mean(1),
            unused=np.where(rows > 0, (load == 0).mean(1), np.nan),
        )


def summarised(measured: Agreement, names: Sequence[str]) -> dict[str, float]:
    """Means over layers, for a row of metrics; without those that mean nothing (no recorded row, no disagreement)."""
    figures = {}
    for name in names:
        values: NDArray[np.float64] = getattr(measured, name)
        if np.isfinite(values).any():
            figures[name] = float(np.nanmean(values))
    return figures
