"""What a training step tells, on each rank and merged."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from megatron_vespo.objective.metrics import LossMetrics
from megatron_vespo.packing.steps import FILLER_KEY, PackingReport


@dataclass(frozen=True)
class TokenScores:
    """What the policy says of labels, at the sampling temperature.

    Attributes:
        log_probs: [t] float32.
        entropy: [t] float32 of the distribution that the label is drawn from, or None if it was not asked for.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None


@dataclass
class StepResult:
    """One optimizer step as one rank saw it, or merged over ranks.

    Attributes:
        loss: sum over the whole step / count over the whole step; the same on every rank.
        denominator: that count.
        gradient_norm: global, before clipping.
        learning_rate: that this step used.
        sums: `LossMetrics.sums`, added over this rank's micro-batches; empty on ranks that only help another one
            (tensor-parallel ranks above 0, pipeline stages before the last).
        sequences: `LossMetrics.sequences`, [s] float32 each, in the order of `keys`.
        keys: of this rank's sequences, ascending, without fillers; empty also on context-parallel ranks above 0.
        forward_backward_seconds, optimizer_seconds: wall clock; merged: of the slowest rank.
        routing: `LayerSums.values` of every MoE layer of the model, [layers, n] float64, of this rank's positions; None
            unless recorded routes were measured.
        route_bytes_of_ranks: of recorded routes that each rank was sent; only whoever sent them knows.
        packing: how well the step's micro-batches were filled and balanced; only whoever packed them knows.
    """

    loss: float
    denominator: int
    gradient_norm: float
    learning_rate: float
    forward_backward_seconds: float
    optimizer_seconds: float
    sums: dict[str, float] = field(default_factory=dict)
    sequences: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: tuple[int, ...] = ()
    routing: torch.Tensor | None = None
    route_bytes_of_ranks: list[int] = field(default_factory=list)
    packing: PackingReport | None = None


def reduce_metrics(
    keys_and_metrics: list[tuple[tuple[int, ...], LossMetrics]],
) -> tuple[dict[str, float], dict[str, torch.Tensor], tuple[int, ...]]:
    """Sums added in order, sequences put in the order of their keys, fillers left out; all on the CPU."""
    sums: dict[str, float] = defaultdict(float)
    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    keys = torch.tensor([key for some, _ in keys_and_metrics for key in some], dtype=torch.int64)
    for _, metrics in keys_and_metrics:
        for name, value in metrics.sums.items():
            sums[name] += float(value)
        for name, values in metrics.sequences.items():
            columns[name].append(values.cpu())
    order = keys.argsort()
    order = order[keys[order] != FILLER_KEY]
    sequences = {name: torch.cat(parts)[order] for name, parts in columns.items()}
    return dict(sums), sequences, tuple(keys[order].tolist())


def merge(results: list[StepResult]) -> StepResult:
    """One result from those of all ranks, in their order."""
    sums, sequences, keys = reduce_metrics(
        [
            (
                result.keys,
                LossMetrics(
                    {k: torch.tensor(v, dtype=torch.float64) for k, v in result.sums.items()}, result.sequences
                ),
            )
            for result in results
        ]
    )
    routing = [result.routing for result in results if result.routing is not None]
    first = results[0]
    return StepResult(
        loss=first.loss,
        denominator=first.denominator,
        gradient_norm=first.gradient_norm,
        learning_rate=first.learning_rate,
        forward_backward_seconds=max(result.forward_backward_seconds for result in results),
        optimizer_seconds=max(result.optimizer_seconds for result in results),
        sums=sums,
        sequences=sequences,
        keys=keys,
        routing=torch.stack(routing).sum(0) if routing else None,
    )
