"""What one rank does: train a case under a layout and tell everything that must not depend on the layout."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from megatron_vespo.architecture.layout_fit import packing_rules
from megatron_vespo.checkpoint.gather import gather_hf_tensors
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.config import ModelConfig, PolicyConfig
from megatron_vespo.packing.batch import MicroBatch
from megatron_vespo.packing.steps import FILLER_KEY, pack_step
from megatron_vespo.parity.case import Case
from megatron_vespo.parity.pool import LOOPBACK
from megatron_vespo.policy.losses import loss_function
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.policy.result import StepResult
from megatron_vespo.rendezvous import listen
from megatron_vespo.routing.slices import StepRoutes, slice_routes

PlantedError = Literal["none", "tensor-parallel-norms", "data-parallel", "embeddings"]
"""A gradient reduction that is left out, to see whether the comparison notices."""


@dataclass
class RankRecord:
    """One rank's part of a run.

    Attributes:
        results: of each step.
        routes: of each step, [n, 4] int64: layer, key, position in the sequence, experts used as bits.
        recomputed_otherwise: positions that recomputation sent to other experts than the forward pass did, over all steps.
        gradients: Hugging Face name -> gradient of the first step, before clipping; on rank 0, else empty.
        weights: Hugging Face name -> weight after the last step; on rank 0, else empty.
    """

    results: list[StepResult]
    routes: list[Tensor]
    recomputed_otherwise: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig, planted: PlantedError) -> RankRecord:
    """All steps of the case. Every rank of the layout calls it."""
    with joined(rank, world_size, port, case, policy) as trainer, _planted(planted):
        loss = loss_function(case.objective, trainer.context_parallel_group)
        rules = packing_rules(case.architecture, policy)
        results, routes, gradients, recomputed_otherwise = [], [], {}, 0
        for number, sequences in enumerate(case.steps):
            micro_batches = pack_step(sequences, rules)[trainer.place.share]
            capturing = _first_gradients(trainer) if number == 0 else contextlib.nullcontext({})
            recorded = _own_routes(case, number, trainer, micro_batches)
            with capturing as captured, used_experts(trainer, micro_batches) as used:
                results.append(trainer.train_step(micro_batches, loss, routes=recorded))
            routes.append(used.routes)
            recomputed_otherwise += used.recomputed_otherwise
            if number == 0:
                gradients = _gathered(trainer, case, captured.__getitem__)
        trainer.settle_parameters()
        weights = _gathered(trainer, case, Parameter.detach)
        return RankRecord(results, routes, recomputed_otherwise, gradients, weights)


def _own_routes(case: Case, step: int, trainer: MegatronPolicy, micro_batches: list[MicroBatch]) -> StepRoutes | None:
    if case.routes is None:
        return None
    shape = case.architecture.routing_shape
    return StepRoutes(slice_routes(micro_batches, case.routes[step], trainer.place, shape), measure=True)


def score(rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig) -> list[dict[int, Tensor]]:
    """Log-probs of each step's labels under the starting weights, by key."""
    with joined(rank, world_size, port, case, policy) as trainer:
        rules = packing_rules(case.architecture, policy)
        shares = [pack_step(sequences, rules)[trainer.place.share] for sequences in case.steps]
        return [{key: s.log_probs for key, s in trainer.score(share).items()} for share in shares]


@contextlib.contextmanager
def joined(rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig) -> Iterator[MegatronPolicy]:
    trainer = MegatronPolicy(
        case.architecture,
        ModelConfig(path=str(case.folder), dtype=case.dtype),
        policy,
        case.optimizer,
        total_steps=len(case.steps),
        seed=0,
        rank=rank,
        world_size=world_size,
        master=listen(LOOPBACK, port) if rank == 0 else (LOOPBACK, port),
        temperature=1.0,
    )
    try:
        load_hf_weights(trainer.model, case.architecture, case.folder)
        trainer.weights_were_loaded()
        yield trainer
    finally:
        trainer.close()


@dataclass
class UsedExperts:
    """Filled when a training pass is over: see `RankRecord`."""

    routes: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.int64))
    recomputed_otherwise: int = 0


@contextlib.contextmanager
def used_experts(trainer: MegatronPolicy, micro_batches: list[MicroBatch]) -> Iterator[UsedExperts]:
    """What the routers gave in the training pass inside, of the positions that they see on this rank."""
    used = UsedExperts()
    chunks = unwrap_model(list(trainer.model))
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    calls: list[list[tuple[bool, Tensor]]] = [[] for _ in routers]
    handles = [router.register_forward_hook(_keep_map(seen)) for router, seen in zip(routers, calls, strict=True)]
    yield used
    for handle in handles:
        handle.remove()
    places = [_places_here(micro_batch) for micro_batch in micro_batches]
    rows = []
    for router, seen in zip(routers, calls, strict=True):
        # What is recomputed runs forward without gradients first. Both happen in the order of the micro-batches.
        with_gradient, without = ([bits for grad, bits in seen if grad is wanted] for wanted in (True, False))
        for place, bits in zip(places, without or with_gradient, strict=True):
            layer = torch.full((len(place),), router.layer_number - 1)  # type: ignore[operator]
            rows.append(torch.column_stack([layer, place, bits]))
        if without:
            used.recomputed_otherwise += sum(
                int((one != other).sum()) for one, other in zip(without, with_gradient, strict=True)
            )
    if rows:
        routes = torch.cat(rows)
        used.routes = routes[routes[:, 1] != FILLER_KEY]


def _keep_map(calls: list[tuple[bool, Tensor]]) -> Callable:
    """A router returns probabilities and, [n, experts] bool, which experts each position goes to."""

    def hook(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        calls.append((torch.is_grad_enabled(), _as_bits(output[1])))

    return hook


def _places_here(micro_batch: MicroBatch) -> Tensor:
    """[n, 2] key and position in the sequence, of the positions on this rank; padding under the fillers' key."""
    starts = micro_batch.cu_seqlens[:-1].repeat_interleave(micro_batch.cu_seqlens.diff())
    position = torch.arange(len(micro_batch.input_ids)) - starts
    number = torch.arange(len(micro_batch.keys)).repeat_interleave(micro_batch.cu_seqlens.diff())
    real = position < torch.tensor(micro_batch.lengths)[number]
    key = torch.where(real, torch.tensor(micro_batch.keys)[number], FILLER_KEY)
    tagged = replace(micro_batch, input_ids=key, labels=position)
    own = tagged.context_slice(
        parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    )
    places = torch.column_stack([own.input_ids, own.labels])
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()  # sequence parallel: a slice for each
    return places.chunk(tensor_parallel)[parallel_state.get_tensor_model_parallel_rank()]


def _as_bits(routing_map: Tensor) -> Tensor:
    """[n, experts] bool -> [n] int64."""
    return (routing_map.long() << torch.arange(routing_map.shape[-1])).sum(-1)


@contextlib.contextmanager
def _first_gradients(trainer: MegatronPolicy) -> Iterator[dict[Parameter, Tensor]]:
    """Filled with every parameter's whole gradient once Megatron has finished them, before they are clipped."""
    config = trainer.model[0].config
    finish: Callable = config.finalize_model_grads_func  # type: ignore[assignment]
    captured: dict[Parameter, Tensor] = {}

    def finish_and_capture(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        for chunk in trainer.model:
            _gather_gradient_shards(chunk)
            captured.update({p: p.main_grad.clone() for p in chunk.parameters()})  # type: ignore[union-attr]

    config.finalize_model_grads_func = finish_and_capture
    try:
        yield captured
    finally:
        config.finalize_model_grads_func = finish


def _gather_gradient_shards(chunk: DistributedDataParallel) -> None:
    """The distributed optimizer leaves each data-parallel rank its own shard of the reduced gradients."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(parts, own, group=group)
            bucket.grad_data.copy_(torch.cat(parts))


def _gathered(trainer: MegatronPolicy, case: Case, value: Callable[[Parameter], Tensor]) -> dict[str, Tensor]:
    tensors = gather_hf_tensors(trainer.model, case.architecture, value=value)
    return {name: tensor.clone() for name, tensor in tensors}


@contextlib.contextmanager
def _planted(error: PlantedError) -> Iterator[None]:
    """Leave one gradient reduction out, in this process, for the time of this block."""
    finalisation = import_module("megatron.core.distributed.finalize_model_grads")  # a function has the same name
    owners: dict[str, tuple[Any, str]] = {
        "tensor-parallel-norms": (finalisation, "_allreduce_non_tensor_model_parallel_grads"),
        "embeddings": (finalisation, "_allreduce_word_embedding_grads"),
        "data-parallel": (DistributedDataParallel, "finish_grad_sync"),
    }
    if error == "none":
        yield
        return
    owner, name = owners[error]
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(owner, name, original)
