"""The policy of one rank: its share of the model, Megatron's schedule over micro-batches, the optimizer."""

import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.config import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.objective.metrics import LossMetrics
from megatron_vespo.policy import parallel
from megatron_vespo.policy.batch import MicroBatch
from megatron_vespo.policy.device import prepare_device
from megatron_vespo.policy.initialise import initialise
from megatron_vespo.policy.model import build_model
from megatron_vespo.policy.optimizer import build_optimizer, build_scheduler
from megatron_vespo.policy.result import StepResult, reduce_metrics

LossFunction = Callable[[Tensor, MicroBatch], tuple[Tensor, Tensor, LossMetrics]]
"""(log_probs [t] float32 with a gradient, micro-batch on the same device) -> (numerator, denominator, metrics).

The numerator is a scalar sum that depends on `log_probs` even if nothing in the micro-batch counts; the denominator an
integer scalar. The step's loss is the sum of all numerators over the sum of all denominators, over ranks and
micro-batches."""


class MegatronPolicy:
    """Lives in one process per rank. All ranks call the same methods at the same time.

    Attributes:
        model: chunks of the model on this rank, wrapped for data parallelism (one without virtual pipeline).
        optimizer, scheduler: Megatron's.
        device: what this rank computes on.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: ModelConfig,
        policy: PolicyConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        seed: int,
        rank: int,
        world_size: int,
        master: tuple[str, int] | socket.socket,
        temperature: float,
    ):
        """Meets the other ranks at `master` (see `parallel.join`) and builds the model. Under `model.initialization: pretrained` the weights are unset:
        write them into `self.model`, then call `weights_were_loaded`.

        Raises:
            ConfigError: the layout does not fit the model.
        """
        self.device = prepare_device(model.dtype)
        parallel.join(
            self.device,
            policy,
            rank=rank,
            world_size=world_size,
            master=master,
            seed=seed,
        )
        built = build_model(architecture, model, policy, self.device, temperature)
        if model.initialization == "random":
            initialise(built, seed)
        self.config = built.config
        wrapped = Float16Module(self.config, built) if self.config.bf16 else built
        gradients = DistributedDataParallelConfig(
            use_distributed_optimizer=policy.distributed_optimizer,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=True,
        )
        self.model: list[DistributedDataParallel] = [DistributedDataParallel(self.config, gradients, wrapped)]
        self.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = build_optimizer(list(self.model), model, policy, optimizer)
        self.scheduler = build_scheduler(self.optimizer, optimizer, total_steps)

    def weights_were_loaded(self) -> None:
        """Call after writing parameters from outside: the optimizer's float32 copies follow them."""
        self.optimizer.reload_model_params()

    def train_step(self, micro_batches: list[MicroBatch], loss: LossFunction) -> StepResult:
        """Forward, backward and one optimizer step. Every rank needs the same number of micro-batches, at least one.

        Raises:
            ValueError: the ranks' numbers of micro-batches differ, or a loss without gradient.
            RuntimeError: a gradient is not finite (from Megatron); the weights are unchanged.
        """
        self._check_counts(len(micro_batches))
        learning_rate = self.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._schedule(micro_batches, partial(_loss_and_count, loss), forward_only=False)
        forward_backward_done = time.perf_counter()
        succeeded, gradient_norm, _ = self.optimizer.step()  # type: ignore[misc]
        if not succeeded:
            raise RuntimeError("Megatron's optimizer refused this step: gradients are not finite")
        self.scheduler.step(1)
        optimizer_done = time.perf_counter()
        numerator, denominator = self._global_sums(outputs)
        sums, sequences, keys = reduce_metrics([(output.keys, output.metrics) for output in outputs])
        return StepResult(
            loss=numerator / max(denominator, 1),
            denominator=int(denominator),
            gradient_norm=float(gradient_norm),
            learning_rate=float(learning_rate),
            forward_backward_seconds=forward_backward_done - started,
            optimizer_seconds=optimizer_done - forward_backward_done,
            sums=sums,
            sequences=sequences,
            keys=keys,
        )

    @torch.no_grad()
    def log_probs(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        """Log-probs of each micro-batch's labels, [t] float32 each, on the CPU. As many micro-batches on every rank."""
        self._check_counts(len(micro_batches))
        for chunk in self.model:
            chunk.eval()
        return self._schedule(micro_batches, _only_log_probs, forward_only=True)

    def close(self) -> None:
        """Leave the other ranks. The object is of no use afterwards."""
        parallel.leave()

    def _schedule(self, micro_batches: list[MicroBatch], finish: Callable, forward_only: bool) -> list:
        run = get_forward_backward_func()
        return run(
            forward_step_func=partial(_forward_step, self.device.torch_device, finish),
            data_iterator=iter(micro_batches),
            model=list(self.model),
            num_microbatches=len(micro_batches),
            seq_length=max(len(micro_batch.input_ids) for micro_batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _check_counts(self, count: int) -> None:
        """With unequal counts the ranks would wait for each other for ever."""
        bounds = torch.tensor([count, -count], device=self.device.torch_device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        most, fewest = bounds[0].item(), -bounds[1].item()
        if most != fewest or fewest < 1:
            raise ValueError(f"each rank needs as many micro-batches and at least 1, found from {fewest} to {most}")

    def _global_sums(self, outputs: list["_Output"]) -> tuple[float, float]:
        totals = torch.stack([torch.stack([o.numerator.double(), o.denominator.double()]) for o in outputs]).sum(0)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        numerator, denominator = totals.tolist()
        return numerator, denominator


@dataclasses.dataclass(frozen=True)
class _Output:
    keys: tuple[int, ...]
    numerator: Tensor
    denominator: Tensor
    metrics: LossMetrics


def _forward_step(
    device: torch.device, finish: Callable, micro_batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Megatron's forward_step_func: the model's output, and what makes a loss of it."""
    micro_batch = _to(device, next(micro_batches))
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro_batch.cu_seqlens,
        cu_seqlens_kv=micro_batch.cu_seqlens,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
    )
    log_probs = model(
        micro_batch.input_ids[None],
        micro_batch.position_ids[None],
        None,
        labels=micro_batch.labels[None],
        packed_seq_params=packing,
    )
    return log_probs, partial(finish, micro_batch)


def _loss_and_count(loss: LossFunction, micro_batch: MicroBatch, log_probs: Tensor) -> tuple[Tensor, Tensor, _Output]:
    """Sum and count: Megatron adds the counts over micro-batches and ranks and divides the gradients once."""
    numerator, denominator, metrics = loss(log_probs, micro_batch)
    if not numerator.requires_grad:
        raise ValueError("the loss does not depend on the log-probs: its backward pass would leave other ranks waiting")
    return numerator, denominator, _Output(micro_batch.keys, numerator.detach(), denominator.detach(), metrics)


def _only_log_probs(micro_batch: MicroBatch, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return log_probs.sum(), torch.zeros((), dtype=torch.int, device=log_probs.device), log_probs.cpu()


def _to(device: torch.device, micro_batch: MicroBatch) -> MicroBatch:
    tensors: dict[str, Any] = {name: v.to(device) for name, v in vars(micro_batch).items() if isinstance(v, Tensor)}
    return dataclasses.replace(micro_batch, **tensors)
