"""What SGLang sends of routed experts is decoded exactly, and whatever is wrong with it has a name."""

import base64
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.routing.codec import BLOCK_BYTES, RoutesError, decode

ALL_MOE = (True, True, True)
MIXED = (False, True, True, False, True)


def random_ids(rows, layers, topk, num_experts, seed=0):
    """[rows, layers, topk], no expert twice in a row of a layer."""
    random = np.random.default_rng(seed)
    return np.array([[random.permutation(num_experts)[:topk] for _ in range(layers)] for _ in range(rows)]).reshape(
        rows, layers, topk
    )


def wire(ids):
    return base64.b64encode(ids.astype("<i4").tobytes()).decode("ascii")


def fault(payload, **asked):
    with pytest.raises(RoutesError) as caught:
        decode(payload, **asked)
    return caught.value


@pytest.mark.parametrize("moe_layers", [ALL_MOE, MIXED, (True,), (False, True)])
@pytest.mark.parametrize(("topk", "num_experts"), [(1, 4), (2, 4), (3, 7), (8, 128), (8, 256), (4, 257), (2, 1000)])
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_experts_are_those_sent(moe_layers, topk, num_experts, rows):
    ids = random_ids(rows, len(moe_layers), topk, num_experts)
    found = decode(wire(ids), rows=rows, moe_layers=moe_layers, topk=topk, num_experts=num_experts)
    assert found.dtype == (np.uint8 if num_experts <= 256 else np.uint16)
    assert found.flags.c_contiguous
    assert found.shape == (rows, sum(moe_layers), topk)
    np.testing.assert_array_equal(found, ids[:, [number for number, moe in enumerate(moe_layers) if moe]])


def many_blocks():
    """[rows, 3, 2] of which three blocks are decoded, the last of them short."""
    rows = 2 * (BLOCK_BYTES // (3 * 2 * 4)) + 7
    return np.tile(random_ids(97, 3, 2, 300), (rows // 97 + 1, 1, 1))[:rows]


@pytest.mark.parametrize("kind", [str, bytes])
def test_payloads_of_many_blocks(kind):
    ids = many_blocks()
    payload = wire(ids) if kind is str else wire(ids).encode()
    np.testing.assert_array_equal(decode(payload, rows=len(ids), moe_layers=ALL_MOE, topk=2, num_experts=300), ids)


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1])
def test_faults_in_every_block_of_many(share):
    ids = many_blocks()
    row = int(share * (len(ids) - 1))
    asked = {"rows": len(ids), "moe_layers": ALL_MOE, "topk": 2, "num_experts": 300}
    ids[row, 1] = 7
    assert str(fault(wire(ids), **asked)) == f"duplicates: row {row}, layer 1: experts [7, 7]"
    ids[row, 1] = 300, 7
    assert str(fault(wire(ids), **asked)) == f"range: row {row}, layer 1: expert 300 of 300"


def test_base64_that_ends_with_a_block():
    ids = many_blocks()
    end = BLOCK_BYTES // (3 * 3 * 2 * 4) * 3 * 32
    payload = wire(ids)[: end - 4] + "AA==" + wire(ids)[end:]
    assert fault(payload, rows=len(ids), moe_layers=ALL_MOE, topk=2, num_experts=300).kind == "truncated"


def test_what_stands_in_dense_layers_does_not_matter():
    ids = random_ids(6, len(MIXED), 2, 8)
    ids[:, 0], ids[:, 3] = -1, 0
    found = decode(wire(ids), rows=6, moe_layers=MIXED, topk=2, num_experts=8)
    np.testing.assert_array_equal(found, ids[:, [1, 2, 4]])


def test_expert_zero_in_few_rows_or_alone_is_no_fault_with_one_expert_per_token():
    ids = np.zeros((7, 3, 1))
    np.testing.assert_array_equal(decode(wire(ids), rows=7, moe_layers=ALL_MOE, topk=1, num_experts=4), ids)
    many = np.zeros((50, 3, 1))
    np.testing.assert_array_equal(decode(wire(many), rows=50, moe_layers=ALL_MOE, topk=1, num_experts=1), many)


GOOD = random_ids(10, 3, 2, 8)
ASKED = {"rows": 10, "moe_layers": ALL_MOE, "topk": 2, "num_experts": 8}


@pytest.mark.parametrize(
    "payload",
    [
        wire(GOOD)[:-4],
        wire(GOOD)[:-3],
        wire(GOOD)[: len(wire(GOOD)) // 2],
        wire(GOOD)[:40] + "!" + wire(GOOD)[41:],
        wire(GOOD)[:40] + "\u00e9" + wire(GOOD)[41:],
        wire(GOOD)[:40] + "AA==" + wire(GOOD)[44:],
        wire(GOOD)[:40] + " " + wire(GOOD)[41:],
        wire(GOOD[:9]),
        wire(GOOD[:0]),
        base64.b64encode(GOOD.astype("<i4").tobytes()[:-1]).decode(),
        "not base64",
    ],
)
def test_truncated(payload):
    assert fault(payload, **ASKED).kind == "truncated"
    assert fault(payload.encode(), **ASKED).kind == "truncated"


@pytest.mark.parametrize(
    "ids",
    [GOOD[:, :2], random_ids(10, 4, 2, 8), random_ids(11, 3, 2, 8), random_ids(20, 3, 2, 8), random_ids(10, 3, 3, 8)],
)
def test_wrong_number_of_layers_or_too_many_rows(ids):
    error = fault(wire(ids), **ASKED)
    assert error.kind == "layers"
    assert "10 rows of 3 layers" in str(error)


def test_rows_where_none_are_due():
    assert fault(wire(GOOD), **(ASKED | {"rows": 0})).kind == "layers"


@pytest.mark.parametrize("moe_layers", [ALL_MOE, (False, True, True)])
@pytest.mark.parametrize("bad", [8, 255, 256 + 3, 2**16 + 1, 2**31 - 1, -1, -(2**31)])
def test_range(moe_layers, bad):
    ids = GOOD.copy()
    ids[4, 2, 1] = bad
    error = fault(wire(ids), **(ASKED | {"moe_layers": moe_layers}))
    assert error.kind == "range"
    assert str(error) == f"range: row 4, layer 2: expert {bad} of 8"


def test_duplicates():
    ids = GOOD.copy()
    ids[4, 2] = 5
    error = fault(wire(ids), **ASKED)
    assert error.kind == "duplicates"
    assert str(error) == "duplicates: row 4, layer 2: experts [5, 5]"


@pytest.mark.parametrize(("rows", "topk"), [(1, 2), (10, 2), (3, 4), (8, 1), (100, 1)])
def test_zero_layer(rows, topk):
    ids = random_ids(rows, len(MIXED), topk, 8)
    ids[:, [1, 2, 4], 0] = np.maximum(ids[:, [1, 2, 4], 0], 1) if topk == 1 else ids[:, [1, 2, 4], 0]
    ids[:, 2] = 0
    error = fault(wire(ids), rows=rows, moe_layers=MIXED, topk=topk, num_experts=8)
    assert error.kind == "zero_layer"
    assert "[2]" in str(error)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_single_wrong_id_is_always_found(data):
    topk, num_experts = data.draw(st.sampled_from([(2, 4), (3, 5), (8, 128), (8, 300), (5, 256)]))
    moe_layers = data.draw(st.lists(st.booleans(), min_size=1, max_size=5).filter(any))
    rows = data.draw(st.integers(1, 20))
    ids = random_ids(rows, len(moe_layers), topk, num_experts, seed=data.draw(st.integers(0, 2**32)))
    row = data.draw(st.integers(0, rows - 1))
    layer = data.draw(st.sampled_from([number for number, moe in enumerate(moe_layers) if moe]))
    place, other = data.draw(st.permutations(range(topk)))[:2]
    outside = st.integers(-(2**31), -1) | st.integers(num_experts, 2**31 - 1)
    wrong, kind = data.draw(
        st.just((ids[row, layer, other], "duplicates")) | outside.map(lambda number: (number, "range"))
    )
    ids[row, layer, place] = wrong
    if kind == "duplicates" and not ids[:, layer].any():
        kind = "zero_layer"
    error = fault(wire(ids), rows=rows, moe_layers=moe_layers, topk=topk, num_experts=num_experts)
    assert error.kind == kind
    if kind != "zero_layer":
        assert f"row {row}, layer {layer}:" in str(error)


def test_faults_travel_between_processes():
    error = fault(wire(GOOD[:9]), **ASKED)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ValueError)
    assert (copy.kind, str(copy)) == (error.kind, str(error))
