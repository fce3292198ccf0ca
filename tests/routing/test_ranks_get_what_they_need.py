"""Each rank gets the routes of its positions and layers, all ranks together get each once, and the way back is exact."""

from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.packing.batch import TrainingSequence, pack
from megatron_vespo.packing.steps import FILLER_KEY, PackingRules, pack_step
from megatron_vespo.routing.routes import Routes, masked_routes, recorded_routes
from megatron_vespo.routing.slices import (
    RankPlace,
    RouteSlice,
    RoutingShape,
    assemble_routes,
    real_positions,
    slice_routes,
)

LAYERS = 8
SHAPE = RoutingShape(moe_layers=(True,) * LAYERS, topk=2, num_experts=16)


class Layout(NamedTuple):
    dp: int = 1
    pp: int = 1
    chunks: int = 1
    """Of a virtual pipeline, on each stage."""
    cp: int = 1
    sp: int = 1


LAYOUTS = [
    Layout(),
    Layout(pp=2),
    Layout(pp=2, chunks=2),
    Layout(pp=2, chunks=4),
    Layout(cp=2),
    Layout(cp=3),
    Layout(sp=4),
    Layout(cp=2, sp=2),
    Layout(dp=2, cp=2, sp=3),
    Layout(pp=2, cp=2, sp=2),
    Layout(dp=2, pp=4, chunks=2, cp=2, sp=2),
]


def places(layout):
    """Of every rank. Layers go round over the stages, chunk by chunk."""
    dealt = np.arange(LAYERS).reshape(layout.chunks, layout.pp, -1)
    return [
        RankPlace(share, tuple(dealt[:, stage].ravel().tolist()), context, layout.cp, sequence, layout.sp)
        for share, stage, context, sequence in product(
            range(layout.dp), range(layout.pp), range(layout.cp), range(layout.sp)
        )
    ]


def sequence_of(positions, key):
    return TrainingSequence(
        token_ids=np.zeros(positions + 1, dtype=np.int32),
        label_mask=np.ones(positions, dtype=np.bool_),
        old_log_probs=np.zeros(positions, dtype=np.float32),
        advantage=1.0,
        key=key,
    )


def step_of(lengths, layout):
    rules = PackingRules(
        ranks=layout.dp,
        token_budget=120,
        segment_multiple=2 * layout.cp if layout.cp > 1 else 1,
        total_multiple=layout.cp * layout.sp,
        minimum_count=2,
    )
    return pack_step([sequence_of(positions, key) for key, positions in enumerate(lengths)], rules)


def routes_of(lengths, seed=0, shares_recorded=1.0):
    random = np.random.default_rng(seed)
    return {
        key: Routes(
            random.integers(1, 16, (positions, LAYERS, 2)).astype(np.uint8),
            random.random(positions) < shares_recorded,
            np.full(positions, 3, dtype=np.int32),
        )
        for key, positions in enumerate(lengths)
    }


def tokens_at(micro_batch, place):
    """(key, position), or None for padding and fillers, of every position that a rank holds, counted one by one."""
    tokens, bounds = [], micro_batch.cu_seqlens.tolist()
    for key, length, (start, end) in zip(micro_batch.keys, micro_batch.lengths, pairwise(bounds), strict=True):
        padded = [(key, at) if at < length and key != FILLER_KEY else None for at in range(end - start)]
        if place.context_size > 1:
            size = (end - start) // (2 * place.context_size)
            parts = [padded[at : at + size] for at in range(0, size * 2 * place.context_size, size or 1)]
            padded = parts[place.context_rank] + parts[-1 - place.context_rank]
        tokens += padded
    each = len(tokens) // place.sequence_size
    return tokens[place.sequence_rank * each : (place.sequence_rank + 1) * each]


LENGTHS = [30, 9, 61, 1, 17, 44, 119, 5]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_slices_are_those_of_each_position_and_layer(layout):
    shares = step_of(LENGTHS, layout)
    routes = routes_of(LENGTHS, shares_recorded=0.8)
    del routes[4]
    for place in places(layout):
        slices = slice_routes(shares[place.share], routes, place, SHAPE)
        for micro_batch, part in zip(shares[place.share], slices, strict=True):
            tokens = tokens_at(micro_batch, place)
            assert part.experts.shape == (len(tokens), len(place.moe_layers), 2)
            assert part.experts.dtype == np.uint8
            for row, token in enumerate(tokens):
                key, position = token or (None, None)
                known = key in routes and bool(routes[key].recorded[position])
                assert part.recorded[row] == known
                for column, layer in enumerate(place.moe_layers):
                    wanted = routes[key].experts[position, layer] if known else [0, 0]
                    assert part.experts[row, column].tolist() == list(wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_real_positions(layout):
    shares = step_of(LENGTHS, layout)
    for place in places(layout):
        for micro_batch in shares[place.share]:
            wanted = [token is not None for token in tokens_at(micro_batch, place)]
            assert real_positions(micro_batch, place).tolist() == wanted


def test_steps_of_these_tests_have_padding_and_fillers():
    shares = step_of(LENGTHS, Layout(dp=2, cp=2, sp=3))
    micro_batches = [micro_batch for share in shares for micro_batch in share]
    assert any(FILLER_KEY in micro_batch.keys for micro_batch in micro_batches)
    assert any(sum(micro_batch.lengths) < micro_batch.cu_seqlens[-1] for micro_batch in micro_batches)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=9), layout=st.sampled_from(LAYOUTS))
def test_each_position_and_layer_reaches_one_rank_and_comes_back(lengths, layout):
    shares = step_of(lengths, layout)
    routes = routes_of(lengths)
    slices = [(place, slice_routes(shares[place.share], routes, place, SHAPE)) for place in places(layout)]
    reached = sum(int(part.recorded.sum()) * part.experts.shape[1] for _, parts in slices for part in parts)
    assert reached == sum(lengths) * LAYERS
    whole = assemble_routes(shares, slices, SHAPE, weight_version=11)
    assert list(whole) == list(range(len(lengths)))
    for key, found in whole.items():
        np.testing.assert_array_equal(found.experts, routes[key].experts)
        assert found.recorded.all() and (found.weight_versions == 11).all()
        assert found.weight_versions.dtype == np.int32


def test_an_eighth_reaches_each_rank():
    layout, lengths = Layout(pp=2, cp=2, sp=2), [64, 32, 128]
    shape = RoutingShape(moe_layers=(True,) * 48, topk=8, num_experts=128)
    assert shape.bytes_per_token == 384
    routes = {
        key: recorded_routes(np.ones((positions, 48, 8), dtype=np.uint8), 0) for key, positions in enumerate(lengths)
    }
    stage_layers = [tuple(range(24)), tuple(range(24, 48))]
    for place in places(layout):
        own = replace(place, moe_layers=stage_layers[place.moe_layers[0] > 0])
        parts = slice_routes(step_of(lengths, layout)[0], routes, own, shape)
        assert sum(part.experts.nbytes for part in parts) == sum(lengths) * 384 // 8
        assert sum(part.num_bytes for part in parts) == sum(lengths) * 384 // 8 + sum(lengths) // 4


def test_no_routes_at_all():
    micro_batches = step_of(LENGTHS, Layout())[0]
    masked = {key: masked_routes(positions, SHAPE, "lost") for key, positions in enumerate(LENGTHS)}
    for routes in ({}, masked):
        for part in slice_routes(micro_batches, routes, RankPlace(0, (2, 3)), SHAPE):
            assert part.experts.shape[1:] == (2, 2)
            assert not part.recorded.any() and not part.experts.any()


def test_a_rank_without_moe_layers():
    (part,) = slice_routes([pack([sequence_of(4, 0)])], routes_of([4]), RankPlace(0, ()), SHAPE)
    assert part.experts.shape == (4, 0, 2)
    assert part.recorded.all()


def test_many_experts_take_two_bytes():
    shape = RoutingShape(moe_layers=(True,), topk=2, num_experts=300)
    routes = {0: recorded_routes(np.array([[[299, 256]]], dtype=np.uint16), 0)}
    (part,) = slice_routes([pack([sequence_of(1, 0)])], routes, RankPlace(0, (0,)), shape)
    assert part.experts.dtype == np.uint16 and part.experts.tolist() == [[[299, 256]]]
    assert shape.bytes_per_token == 4


def recorded_by_two_stages():
    """A step of sequences 0 and 1 on two pipeline stages and two context-parallel ranks, with what they recorded."""
    layout = Layout(pp=2, cp=2)
    shares = step_of([12, 8], layout)
    slices = [(place, slice_routes(shares[0], routes_of([12, 8]), place, SHAPE)) for place in places(layout)]
    return shares, slices


def holding(slices, key, shares):
    """The slice of the last rank that has position 0 of sequence `key`, and its row."""
    for number, (place, parts) in reversed(list(enumerate(slices))):
        for micro_batch, part in zip(shares[0], parts, strict=True):
            tokens = tokens_at(micro_batch, place)
            if (key, 0) in tokens:
                return number, part, tokens.index((key, 0))
    raise AssertionError("no rank has it")


def test_a_hole_is_named():
    shares, slices = recorded_by_two_stages()
    _, part, row = holding(slices, 1, shares)
    part.recorded[row] = False
    with pytest.raises(ValueError, match="sequence 1, position 0, MoE layer 4 was recorded by no rank"):
        assemble_routes(shares, slices, SHAPE, 0)


def test_a_rank_that_is_missing_is_named():
    shares, slices = recorded_by_two_stages()
    number, _, _ = holding(slices, 0, shares)
    with pytest.raises(ValueError, match="sequence 0, position 0, MoE layer 4 was recorded by no rank"):
        assemble_routes(shares, slices[:number] + slices[number + 1 :], SHAPE, 0)


def test_a_double_is_named():
    shares, slices = recorded_by_two_stages()
    number, _, _ = holding(slices, 0, shares)
    with pytest.raises(ValueError, match="sequence 0, position 0, MoE layer 4 was recorded by 2 ranks"):
        assemble_routes(shares, [*slices, slices[number]], SHAPE, 0)


def test_a_sequence_in_two_micro_batches_is_an_error():
    twice = [[pack([sequence_of(3, 0)]), pack([sequence_of(3, 0)])]]
    with pytest.raises(ValueError, match="sequence 0 is twice"):
        assemble_routes(twice, [], SHAPE, 0)


@pytest.mark.parametrize(
    "experts",
    [
        np.zeros((5, LAYERS, 2), dtype=np.uint8),
        np.zeros((4, LAYERS - 1, 2), dtype=np.uint8),
        np.zeros((4, LAYERS, 3), dtype=np.uint8),
        np.zeros((4, LAYERS, 2), dtype=np.uint16),
    ],
)
def test_routes_of_another_shape_are_refused(experts):
    micro_batches = [pack([sequence_of(4, 7)])]
    with pytest.raises(ValueError, match="the routes of sequence 7 are"):
        slice_routes(micro_batches, {7: recorded_routes(experts, 0)}, RankPlace(0, (0,)), SHAPE)
    recorded = RouteSlice(experts, np.ones(len(experts), dtype=np.bool_))
    with pytest.raises(ValueError, match="the routes recorded at"):
        assemble_routes([micro_batches], [(RankPlace(0, tuple(range(LAYERS))), [recorded])], SHAPE, 0)


@pytest.mark.parametrize("place", [RankPlace(0, (0,), 0, 2), RankPlace(0, (0,), 0, 1, 0, 4)])
def test_micro_batches_that_do_not_divide_are_refused(place):
    micro_batches = [pack([sequence_of(6, 0)])]
    with pytest.raises(ValueError, match="divide"):
        slice_routes(micro_batches, routes_of([6]), place, SHAPE)
    with pytest.raises(ValueError, match="divide"):
        real_positions(micro_batches[0], place)
