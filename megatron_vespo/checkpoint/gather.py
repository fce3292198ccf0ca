"""The whole model's Hugging Face tensors on rank 0, one layer at a time: for weight sync and for export."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vespo.checkpoint.forms import split
from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.checkpoint.local_parameters import LocalParameter, local_experts, local_parameters
from megatron_vespo.checkpoint.mapping import Entry
from megatron_vespo.checkpoint.tables import table_of

Place = tuple[str, int | None, int | None]


@torch.no_grad()
def gather_hf_tensors(model_chunks: Sequence[Any], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) in the table's fixed order on global rank 0, and nothing on any other rank.

    Collective over the expert-parallel group of rank 0, one gather per layer with all its experts; the other ranks of
    that group only send, and ranks outside it do nothing. Every rank must call it AND exhaust the iterator
    (`for _ in gather_hf_tensors(...): pass`): a generator that is not run sends nothing, and rank 0 waits.

    Tensors are contiguous, on the parameters' device and in their dtype. Many are views of the live parameters:
    use or copy them before the next optimizer step, and never write to them.

    Raises:
        RuntimeError: the model is not this architecture's, or it is split over pipeline stages.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise RuntimeError("gathering from pipeline stages is not supported")
    table = table_of(architecture)
    held: dict[Place, LocalParameter] = {
        (local.entry.megatron[0], local.layer, local.expert): local
        for local in local_parameters(model_chunks, table, architecture)
    }
    expert_entries = [entry for entry in table.entries if entry.in_expert]
    experts_of_layer: dict[tuple[str, int], Tensor] = {}
    layer_there = None
    for entry, layer, expert in table.places(architecture):
        if layer is not None and expert is not None:
            if layer != layer_there:
                experts_of_layer = _gather_experts(held, expert_entries, layer, architecture)
                layer_there = layer
            full = experts_of_layer.get((entry.megatron[0], expert))
        else:
            full = held[entry.megatron[0], layer, None].parameter.detach()
        if full is not None and dist.get_rank() == 0:
            yield from zip(entry.hf_names(layer, expert), split(entry, full, architecture), strict=True)


def _gather_experts(
    held: dict[Place, LocalParameter], entries: list[Entry], layer: int, architecture: Architecture
) -> dict[tuple[str, int], Tensor]:
    """(Megatron name, expert) -> parameter, of all experts of one layer on rank 0; of none elsewhere."""
    group: Any = parallel_state.get_expert_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    places = [(entry.megatron[0], expert) for expert in local_experts(architecture) for entry in entries]
    mine = [held[name, layer, expert].parameter.detach() for name, expert in places]
    if 0 not in ranks:
        return {}
    if len(ranks) == 1:
        return dict(zip(places, mine, strict=True))
    # as bytes: gloo knows no bfloat16
    sent = torch.cat([tensor.flatten() for tensor in mine]).view(torch.uint8)
    if dist.get_rank() != 0:
        dist.gather(sent, dst=0, group=group)
        return {}
    received = [torch.empty_like(sent) for _ in ranks]
    dist.gather(sent, received, dst=0, group=group)
    sizes = [tensor.numel() for tensor in mine]
    gathered: dict[tuple[str, int], Tensor] = {}
    for turn, buffer in enumerate(received):
        pieces = buffer.view(mine[0].dtype).split(sizes)
        for (name, expert), piece, like in zip(places, pieces, mine, strict=True):
            # rank 0 holds the first experts, and each rank of the group as many
            gathered[name, expert + turn * len(local_experts(architecture))] = piece.view(like.shape)
    return gathered
