"""What each trainer rank needs of the routes: the rows of its own positions, in its own layers, and nothing else.

Pipeline stages split the layers, context and sequence parallelism the positions, data parallelism the sequences. Copied
are runs of positions and of layers, not single rows: a rank's part of a sequence is one or two runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.packing.batch import MicroBatch
from megatron_vespo.packing.steps import FILLER_KEY
from megatron_vespo.routing.routes import Experts, Routes, RoutingShape, recorded_routes
from megatron_vespo.routing.runs import runs


@dataclass(frozen=True)
class RankPlace:
    """Which part of a step's routes a rank holds.

    Attributes:
        share: which data-parallel share of a step is this rank's.
        moe_layers: which MoE layers, counted among the MoE layers of the whole model from 0, in the order of the rank's
            model chunks. With a virtual pipeline they are not contiguous.
        context_rank, context_size: of context parallelism.
        sequence_rank, sequence_size: the tensor-parallel ones with sequence parallelism, else 0 and 1.
    """

    share: int
    moe_layers: tuple[int, ...]
    context_rank: int = 0
    context_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1


@dataclass(frozen=True)
class RouteSlice:
    """Of one micro-batch, as one rank holds its positions.

    Attributes:
        experts: [own positions, own MoE layers, topk], 0 where nothing is recorded.
        recorded: [own positions] bool. The others, padding and fillers among them, have no recorded route.
    """

    experts: Experts
    recorded: NDArray[np.bool_]

    @property
    def num_bytes(self) -> int:
        """That are sent to the rank."""
        return self.experts.nbytes + self.recorded.nbytes


@dataclass(frozen=True)
class StepRoutes:
    """Recorded routes of one rank for one pass."""

    slices: list[RouteSlice]
    """Of each micro-batch."""
    replay: bool = True
    """False: they are only compared with the routers' own choice."""
    measure: bool = False
    """Tell how they agree with it (`StepResult.routing`)."""


class _Span(NamedTuple):
    """Consecutive real positions of a sequence that a rank holds next to each other."""

    key: int
    in_sequence: slice
    here: slice


def slice_routes(
    micro_batches: list[MicroBatch], routes: Mapping[int, Routes], place: RankPlace, shape: RoutingShape
) -> list[RouteSlice]:
    """The routes of a rank's share, as far as the rank needs them, for each of its micro-batches.

    Args:
        micro_batches: of the rank's share.
        routes: of whole sequences by their keys. The positions of a sequence that has none are not recorded.

    Raises:
        ValueError: a sequence's routes are of another shape than the sequence and the model, or a micro-batch does not
            divide among the ranks.
    """
    for micro_batch in micro_batches:
        for key, length in zip(micro_batch.keys, micro_batch.lengths, strict=True):
            if key in routes:
                expected = (length, shape.num_moe_layers, shape.topk)
                _check_experts(f"the routes of sequence {key}", routes[key].experts, expected, shape)
    bounds = [0, *accumulate(_own_positions(micro_batch, place) for micro_batch in micro_batches)]
    # One array for all micro-batches: the system hands out memory of that size in huge pages, several times faster.
    experts = np.zeros((bounds[-1], len(place.moe_layers), shape.topk), dtype=shape.dtype)
    recorded = np.zeros(bounds[-1], dtype=np.bool_)
    slices = [RouteSlice(experts[start:end], recorded[start:end]) for start, end in pairwise(bounds)]
    for micro_batch, part in zip(micro_batches, slices, strict=True):
        _copy(micro_batch, routes, place, part)
    return slices


def _copy(micro_batch: MicroBatch, routes: Mapping[int, Routes], place: RankPlace, part: RouteSlice) -> None:
    layers = runs(place.moe_layers)
    for key, in_sequence, here in _spans(micro_batch, place):
        if key not in routes:
            continue
        part.recorded[here] = routes[key].recorded[in_sequence]
        for first, run in layers:
            part.experts[here, first : first + run.stop - run.start] = routes[key].experts[in_sequence, run]
    part.experts[~part.recorded] = 0


def real_positions(micro_batch: MicroBatch, place: RankPlace) -> NDArray[np.bool_]:
    """[own positions] True where the rank holds a position of a sequence, not padding and not a filler.

    Args:
        micro_batch: the whole, not a context slice.
    """
    real = np.zeros(_own_positions(micro_batch, place), dtype=np.bool_)
    for span in _spans(micro_batch, place):
        real[span.here] = True
    return real


def assemble_routes(
    shares: list[list[MicroBatch]],
    slices: list[tuple[RankPlace, list[RouteSlice]]],
    shape: RoutingShape,
    weight_version: int,
) -> dict[int, Routes]:
    """The inverse of `slice_routes`, of what all ranks recorded in a forward pass: whole sequences by their keys.

    Args:
        shares: the micro-batches of every data-parallel share.
        slices: of each rank that holds positions and layers of its own, one slice for each micro-batch of its share.
        weight_version: whose weights chose.

    Raises:
        ValueError: a position of a sequence was recorded in a layer by no rank, or by two; or a sequence is in two
            micro-batches; or a slice is of another shape than its micro-batch and place.
    """
    lengths = _lengths(shares)
    experts = {key: np.zeros((n, shape.num_moe_layers, shape.topk), dtype=shape.dtype) for key, n in lengths.items()}
    times = {key: np.zeros((n, shape.num_moe_layers), dtype=np.uint8) for key, n in lengths.items()}
    for place, parts in slices:
        layers = runs(place.moe_layers)
        for micro_batch, part in zip(shares[place.share], parts, strict=True):
            expected = (_own_positions(micro_batch, place), len(place.moe_layers), shape.topk)
            _check_experts(f"the routes recorded at {place}", part.experts, expected, shape)
            for key, in_sequence, here in _spans(micro_batch, place):
                recorded = part.recorded[here, None]
                for first, run in layers:
                    whole = experts[key][in_sequence, run]
                    own = part.experts[here, first : first + run.stop - run.start]
                    np.copyto(whole, own, where=True if recorded.all() else recorded[..., None])
                    times[key][in_sequence, run] += recorded
    for key, counted in times.items():
        _check_once(key, counted)
    return {key: recorded_routes(whole, weight_version) for key, whole in experts.items()}


def _lengths(shares: list[list[MicroBatch]]) -> dict[int, int]:
    """Positions of each sequence of a step, in the order of the keys."""
    lengths: dict[int, int] = {}
    for micro_batch in (micro_batch for share in shares for micro_batch in share):
        for key, length in zip(micro_batch.keys, micro_batch.lengths, strict=True):
            if key in lengths:
                raise ValueError(f"sequence {key} is twice in the step")
            if key != FILLER_KEY:
                lengths[key] = length
    return dict(sorted(lengths.items()))


def _check_experts(what: str, experts: Experts, expected: tuple[int, int, int], shape: RoutingShape) -> None:
    if experts.shape != expected or experts.dtype != shape.dtype:
        raise ValueError(
            f"{what} are {experts.dtype} {list(experts.shape)}, expected {np.dtype(shape.dtype)} {list(expected)} "
            "(positions, MoE layers, experts of a token)"
        )


def _check_once(key: int, times: NDArray[np.uint8]) -> None:
    """Of one sequence: [positions, layers] how many ranks recorded it."""
    if (times == 1).all():
        return
    wrong = np.argwhere(times != 1)
    position, layer = wrong[0]
    found = "no rank" if times[position, layer] == 0 else f"{times[position, layer]} ranks"
    raise ValueError(
        f"sequence {key}, position {position}, MoE layer {layer} was recorded by {found}; of the sequence's "
        f"{times.size} routes, {len(wrong)} were not recorded by exactly one"
    )


def _own_positions(micro_batch: MicroBatch, place: RankPlace) -> int:
    bounds = micro_batch.cu_seqlens.tolist()
    pieces = 2 * place.context_size if place.context_size > 1 else 1
    if any((end - start) % pieces for start, end in pairwise(bounds)):
        raise ValueError(f"sequences with bounds {bounds} do not divide into {pieces} chunks for context parallelism")
    ranks = place.context_size * place.sequence_size
    if bounds[-1] % ranks:
        raise ValueError(f"a micro-batch of {bounds[-1]} positions does not divide among {ranks} ranks")
    return bounds[-1] // ranks


def _spans(micro_batch: MicroBatch, place: RankPlace) -> Iterator[_Span]:
    """Of all sequences but fillers, without padding, in the rank's order.

    A context-parallel rank holds chunks of each sequence (see `context_order`). With sequence parallelism each
    tensor-parallel rank has an equal part of all that, behind each other.
    """
    count = _own_positions(micro_batch, place)
    begin = place.sequence_rank * count
    for key, first, at, length in _context_chunks(micro_batch, place):
        low, high = max(at, begin), min(at + length, begin + count)
        if low < high and key != FILLER_KEY:
            yield _Span(key, slice(first + low - at, first + high - at), slice(low - begin, high - begin))


def _context_chunks(micro_batch: MicroBatch, place: RankPlace) -> Iterator[tuple[int, int, int, int]]:
    """(key, first position in the sequence, place on the context-parallel rank, real positions, maybe none)."""
    size = place.context_size
    numbers = (place.context_rank, 2 * size - 1 - place.context_rank) if size > 1 else (0,)
    bounds = pairwise(micro_batch.cu_seqlens.tolist())
    for key, length, (start, end) in zip(micro_batch.keys, micro_batch.lengths, bounds, strict=True):
        chunk = (end - start) // (size * len(numbers))
        for order, number in enumerate(numbers):
            first = number * chunk
            yield key, first, start // size + order * chunk, min(chunk, length - first)
