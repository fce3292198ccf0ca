"""Every context-parallel rank holds the chunks of each sequence that Megatron-Core expects, and together they are all."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import policy_examples
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import utils
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron_vespo.packing.batch import context_gather, pack

TENSORS = ("input_ids", "labels", "position_ids", "label_mask", "old_log_probs")


def packed(tokens, size):
    sequences = policy_examples.sequences(tokens)
    old = [np.arange(1, sequence.positions + 1, dtype=np.float32) for sequence in sequences]
    told_apart = [
        replace(sequence, old_log_probs=log_probs) for sequence, log_probs in zip(sequences, old, strict=True)
    ]
    return pack(told_apart, segment_multiple=2 * size)


def literal_places(micro_batch, rank, size):
    """Positions of the micro-batch, chunk by chunk."""
    places = []
    bounds = micro_batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        chunks = np.array_split(np.arange(start, end), 2 * size)
        places += [*chunks[rank], *chunks[2 * size - 1 - rank]]
    return places


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(2, 60), min_size=1, max_size=6), size=st.integers(2, 4))
def test_slices_and_their_union(tokens, size):
    whole = packed(tokens, size)
    slices = [whole.context_slice(rank, size) for rank in range(size)]
    for rank, part in enumerate(slices):
        places = literal_places(whole, rank, size)
        for name in TENSORS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[places]), name
        assert part.cu_seqlens.tolist() == [bound // size for bound in whole.cu_seqlens.tolist()]
        assert part.cu_seqlens.dtype == whole.cu_seqlens.dtype
        assert part.keys == whole.keys and torch.equal(part.advantages, whole.advantages)
    for name in TENSORS:
        gathered = context_gather([getattr(part, name) for part in slices], whole.cu_seqlens)
        assert torch.equal(gathered, getattr(whole, name)), name


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(2, 40), min_size=1, max_size=6), size=st.integers(2, 4))
def test_real_positions_of_a_slice_come_first(tokens, size):
    whole = packed(tokens, size)
    for rank in range(size):
        part = whole.context_slice(rank, size)
        bounds = part.cu_seqlens.tolist()
        for number, length in enumerate(part.lengths):
            positions = part.position_ids[bounds[number] : bounds[number + 1]]
            real = (positions < whole.lengths[number]).tolist()
            assert real == [True] * length + [False] * (len(real) - length)


@pytest.mark.parametrize("size", [2, 4])
def test_order_is_that_of_megatron_core(size, monkeypatch):
    whole = packed([30, 9, 61], size)
    bounds = whole.cu_seqlens.tolist()
    monkeypatch.setattr(utils, "get_pg_size", lambda group: group.size)
    monkeypatch.setattr(utils, "get_pg_rank", lambda group: group.rank)
    for rank in range(size):
        part = whole.context_slice(rank, size)
        own = part.cu_seqlens.tolist()
        for number, (start, end) in enumerate(pairwise(bounds)):
            here = slice(own[number], own[number + 1])
            rotated_at = _get_thd_freqs_on_this_cp_rank(rank, size, part.input_ids[here], torch.arange(end - start))
            assert torch.equal(part.position_ids[here], rotated_at)
            batch = {"tokens": whole.input_ids[None, start:end]}
            sliced = utils.get_batch_on_this_cp_rank(batch, SimpleNamespace(size=size, rank=rank))
            assert torch.equal(part.input_ids[here], sliced["tokens"][0])


def test_gradients_return_to_the_part_that_they_came_from():
    whole = packed([9, 20], 2)
    parts = [torch.ones(len(whole.input_ids) // 2, 3, requires_grad=True) for _ in range(2)]
    weights = torch.arange(float(len(whole.input_ids)))
    (context_gather(parts, whole.cu_seqlens) * weights[:, None]).sum().backward()
    for rank, part in enumerate(parts):
        assert torch.equal(part.grad[:, 2], weights[literal_places(whole, rank, 2)])


def test_one_rank_holds_everything():
    whole = pack(policy_examples.sequences([6, 3]))
    assert whole.context_slice(0, 1) is whole
    assert context_gather([whole.labels], whole.cu_seqlens) is whole.labels


def test_lengths_that_do_not_divide_are_refused():
    whole = pack(policy_examples.sequences([9, 8]))
    with pytest.raises(ValueError, match=r"multiples of 4 positions, found \[8, 7\]"):
        whole.context_slice(0, 2)
