"""The whole model's Hugging Face tensors on rank 0, piece by piece: for weight sync and for export."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.forms import split, unshard
from megatron_vespo.checkpoint.local_parameters import Share, local_parameters, share_of
from megatron_vespo.checkpoint.mapping import Cut, Place, Shape, Sharding
from megatron_vespo.checkpoint.tables import table_of

Shard = tuple[str, int]
"""(`Place.name`, index among its shards)."""


def parameter_data(parameter: Parameter) -> Tensor:
    return parameter.detach()


@torch.no_grad()
def gather_hf_tensors(
    model_chunks: Sequence[Any], architecture: Architecture, value: Callable[[Parameter], Tensor] = parameter_data
) -> Iterator[tuple[str, Tensor]]:
    """As `GatherPlan.tensors`, layer by layer, of a plan that is used once."""
    yield from GatherPlan(model_chunks, architecture).tensors(value)


class Piece(NamedTuple):
    """What travels together."""

    places: list[Place]
    senders: dict[Shard, int]
    """Shard -> the lowest rank that holds it, of all `places`, in their order."""


class GatherPlan:
    """Which rank sends which shard of a model, settled once for all gatherings of it."""

    def __init__(
        self, model_chunks: Sequence[Any], architecture: Architecture, piece_elements: int | None = None
    ) -> None:
        """Collective over all ranks.

        Args:
            piece_elements: about how many numbers travel together, at most a layer; None: always a layer.

        Raises:
            RuntimeError: this rank's part of the model is not this architecture's (as `local_parameters`); or, on every
                rank alike: the ranks together don't hold all of it.
        """
        table = table_of(architecture)
        self._architecture = architecture
        self._parameters = {
            (local.place.name, local.index): local.parameter
            for local in local_parameters(model_chunks, table, architecture)
        }
        share = share_of(unwrap_model(list(model_chunks)), table, architecture)
        self._shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self._shares, share)
        self._pieces = [
            Piece(places, _senders(places, places[0].layer, self._shares))
            for places in _cut(table.places(architecture), piece_elements)
        ]

    @torch.no_grad()
    def tensors(self, value: Callable[[Parameter], Tensor] = parameter_data) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) in the table's fixed order on global rank 0, and nothing on any other rank.

        Collective over all ranks, in every layout. Each shard comes from the lowest rank that has it, all that a rank has
        to send of a piece in one message; rank 0 holds no more than one piece besides its own share. Every rank must call
        it AND exhaust the iterator: a generator that is not run sends nothing, and rank 0 waits.

        Tensors are contiguous, on the parameters' device and in the dtype of `value`. Many are views of the live
        parameters: use or copy them before the next optimizer step, and never write to them.

        Args:
            value: what is gathered of a parameter (itself, its gradient): a tensor of its shape on its device, of one
                dtype for all. Called once for each; what it gives is kept until the end.

        Raises:
            RuntimeError: on every rank alike: `value` gives other shapes or more than one dtype.
        """
        held = {shard: value(parameter).contiguous() for shard, parameter in self._parameters.items()}
        self._require_alike(held)
        for piece in self._pieces:
            yield from _gather_piece(piece, self._shares, held, self._architecture)

    @torch.no_grad()
    def own_parts(self) -> Iterator[tuple[str, Cut, Tensor]]:
        """What this rank has to give of the whole: (name, where in that tensor, numbers), in the order of `tensors`.

        All ranks together yield every number once. Not collective.
        """
        for places, senders in self._pieces:
            entries = {place.name: place for place in places}
            for (name, index), rank in senders.items():
                if rank == dist.get_rank():
                    held = self._parameters[name, index].detach()
                    yield from _parts_of(entries[name], held, index, self._shares, self._architecture)

    def _require_alike(self, held: dict[Shard, Tensor]) -> None:
        """Raises RuntimeError on every rank if any one's values are not alike, or not of their parameters' shape."""
        problems = [
            f"{name}: value of shape {list(tensor.shape)}, not {list(self._parameters[name, index].shape)}"
            for (name, index), tensor in held.items()
            if tensor.shape != self._parameters[name, index].shape
        ]
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (problems, {str(tensor.dtype) for tensor in held.values()}))
        problems = [problem for theirs, _ in told for problem in theirs]
        if len(dtypes := set().union(*(theirs for _, theirs in told))) > 1:
            problems.append(f"tensors of one dtype can be gathered, not of {', '.join(sorted(dtypes))}")
        if problems:
            raise RuntimeError("\n".join(problems))


def _parts_of(
    place: Place, held: Tensor, index: int, shares: list[Share], architecture: Architecture
) -> Iterator[tuple[str, Cut, Tensor]]:
    """Hugging Face tensors of shard `index` of a place, and where each of them lies in the full one."""
    entry, size = place.entry, _number_of_shards(place, shares)
    if entry.sharding is Sharding.VOCABULARY:
        first, rows = index * len(held), entry.megatron_shape[0]
        last = min(first + len(held), rows)
        if first < rows:
            yield place.hf_names[0], (slice(first, last),), held[: last - first]
        return
    parts = split(entry.of_one_rank(size), held, architecture)
    yield from zip(place.hf_names, entry.cuts(index, size), parts, strict=True)


def _cut(places: Iterator[Place], piece_elements: int | None) -> Iterator[list[Place]]:
    """Consecutive places of one layer, of about so many numbers in all; at least one."""
    for _, layer in itertools.groupby(places, key=lambda place: place.layer):
        piece, elements = [], 0
        for place in layer:
            size = math.prod(place.entry.megatron_shape)
            if piece and piece_elements is not None and elements + size > piece_elements:
                yield piece
                piece, elements = [], 0
            piece.append(place)
            elements += size
        yield piece


def _senders(places: list[Place], layer: int | None, shares: list[Share]) -> dict[Shard, int]:
    """Shard -> the lowest rank that holds it, of all `places` of one layer (None: outside the layers), in their order.

    Raises RuntimeError, on every rank alike, if nobody holds one.
    """
    by_expert: defaultdict[int | None, list[Place]] = defaultdict(list)
    for place in places:
        by_expert[place.expert].append(place)
    lowest: dict[Shard, int] = {}
    for rank, share in enumerate(shares):
        if layer is not None and layer not in share.layers:
            continue
        for place in itertools.chain.from_iterable(by_expert[expert] for expert in (None, *share.experts)):
            if layer is not None or place.name in share.outside_layers:
                lowest.setdefault((place.name, share.shard_of(place.entry)[0]), rank)
    needed = [(place.name, index) for place in places for index in range(_number_of_shards(place, shares))]
    if absent := [name for name, index in needed if (name, index) not in lowest]:
        raise RuntimeError(f"no rank holds {', '.join(absent)}")
    return {shard: lowest[shard] for shard in needed}


def _number_of_shards(place: Place, shares: list[Share]) -> int:
    _, size = shares[0].shard_of(place.entry)  # alike on all ranks
    return size


def _gather_piece(
    piece: Piece, shares: list[Share], held: dict[Shard, Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    places, senders = piece
    if dist.get_rank() != 0:
        if mine := [held[shard] for shard, rank in senders.items() if rank == dist.get_rank()]:
            _exchange([dist.P2POp(dist.isend, _as_bytes(mine), 0)])
        return
    entries = {place.name: place.entry for place in places}
    shapes = {(name, index): shares[rank].shard_shape(entries[name]) for (name, index), rank in senders.items()}
    at_hand = _receive(senders, shapes, like=next(iter(held.values())))
    at_hand |= {shard: held[shard] for shard, rank in senders.items() if rank == 0}
    for place in places:
        shards = [at_hand[place.name, index] for index in range(_number_of_shards(place, shares))]
        full = unshard(place.entry, shards, architecture)
        yield from zip(place.hf_names, split(place.entry, full, architecture), strict=True)


def _receive(senders: dict[Shard, int], shapes: dict[Shard, Shape], like: Tensor) -> dict[Shard, Tensor]:
    """What other ranks send, all at once. `like`: a tensor of the dtype and on the device of all."""
    lists = {rank: [shard for shard in senders if senders[shard] == rank] for rank in set(senders.values()) - {0}}
    sizes = {rank: [math.prod(shapes[shard]) for shard in shards] for rank, shards in lists.items()}
    buffers = {
        rank: torch.empty(sum(sizes[rank]) * like.itemsize, dtype=torch.uint8, device=like.device) for rank in lists
    }
    _exchange([dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in buffers.items()])
    received: dict[Shard, Tensor] = {}
    for rank, shards in lists.items():
        pieces = buffers[rank].view(like.dtype).split(sizes[rank])
        received |= {shard: piece.view(shapes[shard]) for shard, piece in zip(shards, pieces, strict=True)}
    return received


def _as_bytes(tensors: list[Tensor]) -> Tensor:
    """Flat: gloo knows no bfloat16."""
    return torch.cat([tensor.flatten() for tensor in tensors]).view(torch.uint8)


def _exchange(operations: list[dist.P2POp]) -> None:
    """As one batch: NCCL then uses the whole group's connections, and opens none for each pair."""
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
