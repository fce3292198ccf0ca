"""The policy of one rank: its share of the model, Megatron's schedule over micro-batches, the optimizer."""

import contextlib
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.config import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.objective.metrics import LossMetrics, gradient_mass
from megatron_vespo.policy import parallel
from megatron_vespo.policy.batch import MicroBatch, context_gather
from megatron_vespo.policy.device import prepare_device
from megatron_vespo.policy.frozen import FrozenWeights
from megatron_vespo.policy.initialise import initialise
from megatron_vespo.policy.model import PolicyModel, build_model
from megatron_vespo.policy.optimizer import build_optimizer, build_scheduler
from megatron_vespo.policy.packing import FILLER_KEY
from megatron_vespo.policy.result import StepResult, TokenScores, reduce_metrics
from megatron_vespo.policy.saved_state import Saving, begin_save, load_saved
from megatron_vespo.policy.schedule import (
    LossFunction,
    LossOutput,
    forward_and_backward,
    forward_only,
    require_equal_counts,
)
from megatron_vespo.routing.replay import OwnPositions, RoutingPass, RoutingReplay
from megatron_vespo.routing.slices import RouteSlice, StepRoutes, real_positions


class MegatronPolicy:
    """Lives in one process per rank. All ranks call the same methods at the same time.

    Attributes:
        model: chunks of the model on this rank, wrapped for data parallelism (one without virtual pipeline).
        optimizer, scheduler: Megatron's.
        device: what this rank computes on.
        place: which share of a step, and which of its routes, are this rank's.
        context_parallel_group: ranks among which the positions of each sequence are dealt out, or None.
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
        """Meets the other ranks at `master` (see `parallel.join`) and builds the model.

        Under `model.initialization: pretrained` the weights are unset: write them into `self.model`, then call
        `weights_were_loaded`.

        Raises:
            ConfigError: the layout does not fit the model, or needs what this machine lacks.
        """
        self.device = prepare_device(model.dtype)
        parallel.join(self.device, policy, rank=rank, world_size=world_size, master=master, seed=seed)
        self.context_parallel_group = parallel.context_parallel_group()
        self._settings = policy
        self._scale_by_kept_gradient = optimizer.scale_by_kept_gradient
        self._rank = rank
        self._frozen: FrozenWeights | None = None
        self._bare = build_model(architecture, model, policy, self.device, temperature)
        if model.initialization == "random":
            initialise(self._bare, architecture, seed)
        self.model = _wrap(self._bare, policy)
        self._moe_layers = sum(architecture.moe_layers)
        self._routing = RoutingReplay(self.model, architecture.moe_layers, self._bare[0].config)
        self.place = parallel.rank_place(self._routing.moe_layers, policy.layout.sequence_parallel)
        self.optimizer = build_optimizer(list(self.model), model, policy, optimizer, self.device)
        self.scheduler = build_scheduler(self.optimizer, optimizer, total_steps)

    def weights_were_loaded(self) -> None:
        """Call after writing parameters from outside: the optimizer's float32 copies follow them."""
        self.optimizer.reload_model_params()

    def freeze_reference(self, offload: bool) -> None:
        """Keep the weights as they are now for `score(..., reference=True)`; `offload`: in host memory."""
        self.settle_parameters()
        self._frozen = FrozenWeights(self.model, offload)

    def settle_parameters(self) -> None:
        """Finish gathering updated parameters over data-parallel ranks: call before they are read from outside.

        Every rank must call it. Only with `overlap_parameter_gathering` is there anything to finish.
        """
        if self._settings.overlap_parameter_gathering:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def train_step(
        self,
        micro_batches: list[MicroBatch],
        loss: LossFunction,
        with_entropy: bool = False,
        routes: StepRoutes | None = None,
    ) -> StepResult:
        """Forward, backward and one optimizer step. Every rank needs the same number of micro-batches, at least one.

        `with_entropy`: the loss gets the entropy of every distribution too, with its gradient. `routes`: recorded ones, to
        replay or to compare with.

        The ranks of one copy of the model (tensor, pipeline, context parallel) get the same micro-batches, but each its
        own routes (`place`).

        Raises:
            ValueError: the ranks' numbers of micro-batches differ, or a loss without gradient.
            RuntimeError: a gradient is not finite (from Megatron); the weights are unchanged.
            ReplayError: a route was not used exactly once.
        """
        started = time.perf_counter()
        told = self._backward(micro_batches, loss, with_entropy, routes)
        if self._scale_by_kept_gradient:
            self._scale_rate(told)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        forward_backward_done = time.perf_counter()
        succeeded, gradient_norm, _ = self.optimizer.step()  # type: ignore[misc]
        if not succeeded:
            raise RuntimeError("Megatron's optimizer refused this step: gradients are not finite")
        self.scheduler.step(1)
        optimizer_done = time.perf_counter()
        numerator, denominator = self._global_sums(told)
        sums, sequences, keys = reduce_metrics([self._own_part(output) for output in told])
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
            routing=self._routing.sums(self._moe_layers),
        )

    def gradient_norm(
        self,
        micro_batches: list[MicroBatch],
        loss: LossFunction,
        with_entropy: bool = False,
        routes: StepRoutes | None = None,
    ) -> tuple[float, int]:
        """As `train_step`, but nothing is learned.

        Returns:
            Global norm of the gradient, and the denominator of the loss: the same on every rank.

        Raises:
            ValueError, RuntimeError: as `train_step`.
        """
        told = self._backward(micro_batches, loss, with_entropy, routes)
        if self.optimizer.prepare_grads():
            raise RuntimeError("gradients are not finite")
        return float(self.optimizer.get_grad_norm()), int(self._global_sums(told)[1])

    def score(
        self,
        micro_batches: list[MicroBatch],
        *,
        with_entropy: bool = False,
        reference: bool = False,
        routes: StepRoutes | None = None,
    ) -> dict[int, TokenScores]:
        """Scores of every sequence's labels by key, [n - 1] on the CPU; of one share on one of its ranks, else empty.

        `reference`: of the weights that `freeze_reference` kept. As many micro-batches on every rank.

        Raises:
            ValueError: the ranks' numbers of micro-batches differ.
            RuntimeError: there is no reference.
            ReplayError: a route was not used exactly once.
        """
        return self._score(micro_batches, with_entropy, reference, routes, record=False)[0]

    def score_and_record(
        self, micro_batches: list[MicroBatch], *, routes: StepRoutes | None = None
    ) -> tuple[dict[int, TokenScores], list[RouteSlice]]:
        """As `score`, and which experts were used at this rank's positions, in its layers, of each micro-batch."""
        return self._score(micro_batches, False, False, routes, record=True)

    def _score(
        self,
        micro_batches: list[MicroBatch],
        with_entropy: bool,
        reference: bool,
        routes: StepRoutes | None,
        record: bool,
    ) -> tuple[dict[int, TokenScores], list[RouteSlice]]:
        require_equal_counts(len(micro_batches), self.device.torch_device)
        passing = self._passing(micro_batches, routes, record=record)
        with self._weights(reference), self._entropy(with_entropy), passing as routing:
            for chunk in self.model:
                chunk.eval()
            parts = forward_only(self.model, micro_batches, self.device.torch_device, routing)
        scores: dict[int, TokenScores] = {}
        for micro_batch, part in zip(micro_batches, parts, strict=False):
            log_probs = self._all_positions(part.log_probs, micro_batch)
            entropy = None if part.entropy is None else self._all_positions(part.entropy, micro_batch)
            scores |= _by_key(micro_batch, log_probs, entropy)
        first = self.context_parallel_group is None or self.context_parallel_group.rank() == 0
        recorded = routing.recorded() if record else []
        return (scores if parallel.holds_scores() and first else {}), recorded

    def begin_save(self, folder: Path) -> Saving:
        """Begin to write the training state of now into `folder`, which exists; training may go on meanwhile.

        What is returned tells when this rank's files are written; `finish` it on all ranks together.
        """
        self.settle_parameters()
        return begin_save(self.model, self.optimizer, folder, self._rank)

    def load_saved(self, folder: Path, step: int) -> None:
        """The state that was saved after `step` steps, in whatever layout, in place of a freshly built policy's."""
        load_saved(self.model, self.optimizer, folder, self._rank, step)
        self.scheduler.step(step)

    def close(self) -> None:
        """Leave the other ranks. The object is of no use afterwards."""
        _release(self.model)
        parallel.leave()

    def _backward(
        self, micro_batches: list[MicroBatch], loss: LossFunction, with_entropy: bool, routes: StepRoutes | None
    ) -> list[LossOutput]:
        """The step's gradient, reduced over ranks. Returns what the losses told, on ranks that hold scores."""
        require_equal_counts(len(micro_batches), self.device.torch_device)
        for chunk in self.model:
            if not chunk.training:  # it walks through all modules
                chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        passing = self._passing(micro_batches, routes, backward=True)
        with self._entropy(with_entropy), passing as routing:
            outputs = forward_and_backward(self.model, micro_batches, loss, self.device.torch_device, routing)
        return outputs if parallel.holds_scores() else []

    def _passing(
        self, micro_batches: list[MicroBatch], routes: StepRoutes | None, backward: bool = False, record: bool = False
    ) -> contextlib.AbstractContextManager[RoutingPass]:
        return self._routing.passing(
            [self._own_positions(micro_batch) for micro_batch in micro_batches],
            routes=None if routes is None else routes.slices,
            replay=routes is not None and routes.replay,
            backward=backward,
            record=record,
            measure=routes is not None and routes.measure,
        )

    def _own_positions(self, micro_batch: MicroBatch) -> OwnPositions:
        real = real_positions(micro_batch, self.place)
        padding = None if real.all() else torch.from_numpy(~real).to(self.device.torch_device)
        return OwnPositions(len(real), padding, nobody=all(key == FILLER_KEY for key in micro_batch.keys))

    def _weights(self, reference: bool) -> contextlib.AbstractContextManager[None]:
        if not reference:
            return contextlib.nullcontext()
        if self._frozen is None:
            raise RuntimeError("there are no reference weights: call freeze_reference first")
        self.settle_parameters()
        return self._frozen.in_place_of(self.model)

    @contextlib.contextmanager
    def _entropy(self, wanted: bool):
        for chunk in self._bare:
            chunk.with_entropy = wanted
        try:
            yield
        finally:
            for chunk in self._bare:
                chunk.with_entropy = False

    def _all_positions(self, part: Tensor, micro_batch: MicroBatch) -> Tensor:
        """This rank's [t / cp] -> [t] of the micro-batch, on the CPU."""
        if self.context_parallel_group is None:
            return part.cpu()
        parts = [torch.empty_like(part) for _ in range(self.context_parallel_group.size())]
        dist.all_gather(parts, part.contiguous(), group=self.context_parallel_group)
        return context_gather([p.cpu() for p in parts], micro_batch.cu_seqlens)

    def _own_part(self, output: LossOutput) -> tuple[tuple[int, ...], LossMetrics]:
        """Context-parallel ranks have sums of different positions, but the same sequences."""
        if self.context_parallel_group is None or self.context_parallel_group.rank() == 0:
            return output.keys, output.metrics
        return (), LossMetrics(sums=output.metrics.sums)

    def _scale_rate(self, outputs: list[LossOutput]) -> None:
        """By the share of the gradient that the kernel lets through, for the step that comes; the scheduler sets the next
        one's rate anew."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device.torch_device)
        for output in outputs:
            totals += gradient_mass(output.metrics)
        dist.all_reduce(totals)  # ranks that share a sequence count it as often in both
        kept, whole = totals.tolist()
        for group in self.optimizer.param_groups:
            group["lr"] *= min(1.0, kept / whole) if whole > 0 else 1.0

    def _global_sums(self, outputs: list[LossOutput]) -> tuple[float, float]:
        totals = torch.zeros(2, dtype=torch.float64, device=self.device.torch_device)
        for output in outputs:
            totals += torch.stack([output.numerator.double(), output.denominator.double()])
        dist.all_reduce(totals)
        numerator, denominator = totals.tolist()
        return numerator, denominator


def _wrap(bare: list[PolicyModel], policy: PolicyConfig) -> list[DistributedDataParallel]:
    """Data parallelism around each chunk, and the model's config told how its gradients are finished."""
    config = bare[0].config
    gradients = DistributedDataParallelConfig(
        use_distributed_optimizer=policy.distributed_optimizer,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=True,
        overlap_grad_reduce=policy.overlap_gradient_reduction,
        overlap_param_gather=policy.overlap_parameter_gathering,
    )
    wrapped = [
        # Communication of later chunks hides behind the computation of others anyway, as in Megatron's training.
        DistributedDataParallel(
            config, gradients, Float16Module(config, chunk) if config.bf16 else chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(bare)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if policy.overlap_gradient_reduction:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]  # type: ignore[assignment]
    return wrapped


def _release(chunks: list[DistributedDataParallel]) -> None:
    """Let the model go with its process groups, and their threads and sockets.

    Token dispatchers keep tensors of the last backward graph, the graph keeps Megatron's hooks on every parameter, and
    these keep the model, through autograd, where Python's garbage collector does not see the circle.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        for dispatcher in (m.token_dispatcher for m in chunk.modules() if isinstance(m, BaseMoELayer)):
            for name in [name for name, value in vars(dispatcher).items() if isinstance(value, Tensor)]:
                setattr(dispatcher, name, None)


def _by_key(micro_batch: MicroBatch, log_probs: Tensor, entropy: Tensor | None) -> dict[int, TokenScores]:
    """Cut [t] at the sequences' bounds, padding and fillers left out."""
    starts = micro_batch.cu_seqlens.tolist()
    return {
        key: TokenScores(
            log_probs[start : start + length], None if entropy is None else entropy[start : start + length]
        )
        for key, start, length in zip(micro_batch.keys, starts, micro_batch.lengths, strict=False)
        if key != FILLER_KEY
    }
