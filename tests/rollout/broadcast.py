"""The trainer's end of a weight update, in plain torch: a gloo group met as SGLang meets it, one flat buffer."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

GROUP = "weights"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(port: int, world_size: int) -> dist.ProcessGroup:
    timeout = timedelta(seconds=60)
    store = dist.PrefixStore(GROUP, dist.TCPStore("127.0.0.1", port, world_size, is_master=True, timeout=timeout))
    group, _ = _new_process_group_helper(
        world_size, 0, [], dist.Backend("gloo"), store, group_name=GROUP, backend_options=None, timeout=timeout
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


@contextmanager
def group_with(engine) -> Iterator[dist.ProcessGroup]:
    port, world_size = _free_port(), 1 + engine.client.ranks

    async def meet():
        joining = asyncio.to_thread(_join, port, world_size)
        coming = engine.client.init_weights_update_group(
            master_address="127.0.0.1",
            master_port=port,
            rank_offset=1,
            world_size=world_size,
            group_name=GROUP,
            backend="gloo",
        )
        return (await asyncio.gather(joining, coming))[0]

    group = engine.run(meet())
    try:
        yield group
    finally:
        engine.run(engine.client.destroy_weights_update_group(GROUP))
        dist.destroy_process_group(group)


def update(
    engine, group: dist.ProcessGroup, tensors: dict[str, torch.Tensor], weight_version: int, *, flush_cache: bool = True
) -> None:
    """Send `tensors` as one bucket, and flush the engine's caches."""
    engine.run(send(engine, group, tensors, weight_version, flush_cache=flush_cache))


async def send(
    engine, group: dist.ProcessGroup, tensors: dict[str, torch.Tensor], weight_version: int, *, flush_cache: bool = True
) -> None:
    """As `update`, within the engine's event loop."""
    flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors.values()])
    await engine.client.begin_weight_update()
    await asyncio.gather(
        engine.client.update_weights_from_distributed(
            names=list(tensors),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            shapes=[list(tensor.shape) for tensor in tensors.values()],
            group_name=GROUP,
            weight_version=weight_version,
        ),
        asyncio.to_thread(dist.broadcast, flat, 0, group),
    )
    await engine.client.end_weight_update()
    if flush_cache:
        await engine.client.flush_cache()
