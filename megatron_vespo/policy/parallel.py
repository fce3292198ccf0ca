"""The process groups: the only module that sets or clears Megatron's process-global parallel state."""

import math
import random
import socket
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vespo.config import PolicyConfig
from megatron_vespo.policy.device import Device
from megatron_vespo.rendezvous import host_store, join_store
from megatron_vespo.routing.slices import RankPlace

LATER = timedelta(seconds=60)
"""Ranks wait for each other longer than the driver waits for them, which can say which of them does not answer."""


def join(
    device: Device,
    policy: PolicyConfig,
    *,
    rank: int,
    world_size: int,
    master: tuple[str, int] | socket.socket,
    seed: int,
) -> None:
    """Meet the other ranks, form the layout's process groups and seed every generator of this process.

    `master` is where rank 0 listens: on rank 0 the open socket (`rendezvous.listen`), elsewhere its address and port.

    Raises:
        ValueError: the number of processes is not the configured number of ranks.
        RuntimeError: the ranks did not meet in time, or this process has joined a group before and not left it.
    """
    if world_size != policy.ranks:
        raise ValueError(f"policy.ranks is {policy.ranks}, but {world_size} processes were started")
    timeout = timedelta(seconds=policy.step_timeout_seconds) + LATER
    if isinstance(master, socket.socket):
        store = host_store(master, world_size, timeout)
    else:
        store = join_store(*master, world_size, timeout)
    dist.init_process_group(
        device.backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    layout = policy.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
        create_gloo_process_groups=False,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def rank_place(moe_layers: tuple[int, ...], sequence_parallel: bool) -> RankPlace:
    """Which share of a step this rank computes (the ranks of one copy of the model have the same), and which positions of
    it. `moe_layers`: those that it holds."""
    split = sequence_parallel and parallel_state.get_tensor_model_parallel_world_size() > 1
    return RankPlace(
        share=parallel_state.get_data_parallel_rank(),
        moe_layers=moe_layers,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        sequence_rank=parallel_state.get_tensor_model_parallel_rank() if split else 0,
        sequence_size=parallel_state.get_tensor_model_parallel_world_size() if split else 1,
    )


def context_parallel_group() -> dist.ProcessGroup | None:
    """Ranks among which the positions of each sequence are dealt out; None without context parallelism."""
    group: dist.ProcessGroup = parallel_state.get_context_parallel_group()  # type: ignore[assignment]
    return group if group.size() > 1 else None


def holds_scores() -> bool:
    """Whether this rank is the one among tensor-parallel ranks and pipeline stages that tells log-probs and losses."""
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return last_stage and parallel_state.get_tensor_model_parallel_rank() == 0


def leave() -> None:
    """Forget the layout and close every connection to the other ranks."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
