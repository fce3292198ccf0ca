"""Micro-batches through the model: Megatron-Core's pipeline schedules, and what its callbacks hand over."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vespo.objective.metrics import LossMetrics
from megatron_vespo.packing.batch import MicroBatch
from megatron_vespo.policy.parallel import context_parallel_group
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.routing.replay import RoutingPass

LossFunction = Callable[[TokenScores, MicroBatch], tuple[Tensor, Tensor, LossMetrics]]
"""(scores with a gradient, micro-batch on the same device) -> (numerator, denominator, metrics).

With context parallelism both hold this rank's positions only. The numerator is a scalar sum that depends on the scores
even if nothing in the micro-batch counts; the denominator an integer scalar. The step's loss is the sum of all
numerators over the sum of all denominators, over ranks and micro-batches; a metric likewise."""


NumberedMicroBatches = Iterator[tuple[int, MicroBatch]]


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What one micro-batch's loss told, detached."""

    keys: tuple[int, ...]
    numerator: Tensor
    denominator: Tensor
    metrics: LossMetrics


def forward_and_backward(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    loss: LossFunction,
    device: torch.device,
    routing: RoutingPass,
) -> list[LossOutput]:
    """Accumulate and reduce the gradients of all micro-batches. Not empty on the last pipeline stage only."""
    return _run(chunks, micro_batches, partial(_loss_and_count, loss), device, routing, forward_only=False)


@torch.no_grad()
def forward_only(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    device: torch.device,
    routing: RoutingPass,
) -> list[TokenScores]:
    """Scores of each micro-batch's labels, of this rank's positions. Not empty on the last pipeline stage only."""
    return _run(chunks, micro_batches, _only_scores, device, routing, forward_only=True)


def require_equal_counts(count: int, device: torch.device) -> None:
    """Raises ValueError on every rank if numbers of micro-batches differ: the ranks would wait for each other for ever."""
    bounds = torch.tensor([count, -count], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    most, fewest = bounds[0].item(), -bounds[1].item()
    if most != fewest or fewest < 1:
        raise ValueError(f"each rank needs as many micro-batches and at least 1, found from {fewest} to {most}")


def _run(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    finish: Callable,
    device: torch.device,
    routing: RoutingPass,
    forward_only: bool,
) -> list:
    run = get_forward_backward_func()
    iterators: list[NumberedMicroBatches] = [iter(enumerate(micro_batches)) for _ in chunks]
    return run(
        forward_step_func=partial(_forward_step, device, finish, routing),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=max(len(micro_batch.input_ids) for micro_batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(
    device: torch.device,
    finish: Callable,
    routing: RoutingPass,
    micro_batches: NumberedMicroBatches,
    model: torch.nn.Module,
) -> tuple[Any, Callable]:
    """Megatron's forward_step_func: the model's output, and what makes a loss of it."""
    number, whole = next(micro_batches)
    group = context_parallel_group()
    own = _to(device, whole.context_slice(group.rank(), group.size()) if group else whole)
    bounds = whole.cu_seqlens.to(device)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        # Transformer Engine's context parallelism asks for the bounds with padding by this name.
        cu_seqlens_q_padded=bounds if group else None,  # type: ignore[arg-type]
        cu_seqlens_kv_padded=bounds if group else None,  # type: ignore[arg-type]
        max_seqlen_q=whole.max_seqlen,
        max_seqlen_kv=whole.max_seqlen,
    )
    routing.begin_forward(model, number)
    output = model(
        own.input_ids[None], own.position_ids[None], None, labels=own.labels[None], packed_seq_params=packing
    )
    # Hidden states, or on the last stage (log-probs, entropy).
    routing.watch_backward(model, number, output[0] if isinstance(output, tuple) else output)
    return output, partial(finish, own)


def _loss_and_count(
    loss: LossFunction, micro_batch: MicroBatch, output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor, LossOutput]:
    """Sum and count: Megatron adds the counts over micro-batches and ranks and divides the gradients once."""
    numerator, denominator, metrics = loss(TokenScores(*output), micro_batch)
    if not numerator.requires_grad:
        raise ValueError("the loss does not depend on the log-probs: its backward pass would leave other ranks waiting")
    return numerator, denominator, LossOutput(micro_batch.keys, numerator.detach(), denominator.detach(), metrics)


def _only_scores(micro_batch: MicroBatch, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor, TokenScores]:
    scores = TokenScores(*output)
    return scores.log_probs.sum(), torch.zeros((), dtype=torch.int, device=scores.log_probs.device), scores


def _to(device: torch.device, micro_batch: MicroBatch) -> MicroBatch:
    tensors: dict[str, Any] = {name: v.to(device) for name, v in vars(micro_batch).items() if isinstance(v, Tensor)}
    return dataclasses.replace(micro_batch, **tensors)
