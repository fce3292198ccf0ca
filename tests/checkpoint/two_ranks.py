"""Run a function of (rank, ...) on two real processes that form Megatron's groups over gloo."""

import socket
from collections.abc import Callable
from typing import Any

import torch

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.config import LayoutConfig, ModelConfig, PolicyConfig
from megatron_vespo.policy import parallel
from megatron_vespo.policy.device import Device, prepare_device
from megatron_vespo.policy.model import PolicyModel, build_model
from megatron_vespo.rendezvous import listen

RANKS = 2


def run_on_two_ranks(job: Callable[..., None], *arguments: Any) -> None:
    """Call `job(rank, port, *arguments)` in two processes; the first failure is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_in_process, args=(job, port, arguments), nprocs=RANKS)


def _in_process(rank: int, job: Callable[..., None], port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    job(rank, port, *arguments)


def join(rank: int, port: int, ep: int) -> Device:
    device = prepare_device("float32")
    policy = PolicyConfig(ranks=RANKS, layout=LayoutConfig(ep=ep), step_timeout_seconds=60)
    master = listen("127.0.0.1", port) if rank == 0 else ("127.0.0.1", port)
    parallel.join(device, policy, rank=rank, world_size=RANKS, master=master, seed=0)
    return device


def poisoned_model(architecture: Architecture, device: Device, ep: int, dtype: str) -> PolicyModel:
    """A model all of whose parameters are NaN, so that one that is not loaded is seen."""
    policy = PolicyConfig(ranks=RANKS, layout=LayoutConfig(ep=ep))
    model = build_model(architecture, ModelConfig(path="unused", dtype=dtype), policy, device, temperature=1.0)  # type: ignore
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model
