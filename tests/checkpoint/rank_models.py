"""A model on one of several ranks that form Megatron's groups over gloo."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import LayoutConfig, ModelConfig, PolicyConfig
from megatron_vespo.policy import parallel
from megatron_vespo.policy.device import Device, prepare_device
from megatron_vespo.policy.model import PolicyModel, build_model
from megatron_vespo.rendezvous import listen


@contextmanager
def joined(rank: int, world_size: int, port: int, layout: dict[str, int]) -> Iterator[Device]:
    """In Megatron's groups of that layout."""
    device = prepare_device("float32")
    policy = PolicyConfig(ranks=world_size, layout=LayoutConfig(**layout), step_timeout_seconds=60)
    master = listen("127.0.0.1", port) if rank == 0 else ("127.0.0.1", port)
    parallel.join(device, policy, rank=rank, world_size=world_size, master=master, seed=0)
    try:
        yield device
    finally:
        parallel.leave()


def poisoned_model(
    architecture: Architecture, device: Device, layout: dict[str, int], dtype: str, vocabulary_multiple: int = 1
) -> list[PolicyModel]:
    """This rank's chunks of a model all of whose parameters are NaN, so that one that is not written is seen."""
    policy = PolicyConfig(
        ranks=torch.distributed.get_world_size(),
        layout=LayoutConfig(**layout),
        vocabulary_multiple=vocabulary_multiple,
    )
    model = ModelConfig(path="unused", dtype=dtype)  # type: ignore[arg-type]
    chunks = build_model(architecture, model, policy, device, temperature=1.0)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    return chunks
