"""Context parallelism: each rank computes its rows as if it had all keys and values, gradients included."""

import attention_jobs
import dense_attention
import pytest
import torch
from zigzag import rows_of

LENGTHS = [8, 16, 24, 8, 8, 40]


@pytest.mark.parametrize(
    ("size", "heads", "groups", "scale", "recompute"),
    [(2, 4, 4, None, False), (2, 4, 2, 0.3, True), (4, 4, 2, None, False)],
)
def test_output_and_gradients(ranks, size, heads, groups, scale, recompute):
    tensors = dense_attention.random_qkv(LENGTHS, heads, groups, width=8)
    expected, gradients = dense_attention.dense_with_gradients(tensors[:3], tensors[3], LENGTHS, scale)
    rows = [rows_of(rank, size, LENGTHS) for rank in range(size)]
    answers = ranks.run(size, attention_jobs.attend, rows, tensors, LENGTHS, scale, recompute)
    for mine, answer in zip(rows, answers, strict=True):
        for found, whole in zip(answer, [expected, *gradients], strict=True):
            torch.testing.assert_close(found.double(), whole[mine], atol=2e-5, rtol=1e-5)


def test_recomputing_changes_nothing_on_one_rank(ranks):
    lengths = [7, 1, 12]
    tensors = dense_attention.random_qkv(lengths, 4, 2, width=8)
    rows = [torch.arange(sum(lengths))]
    kept, computed_again = (
        ranks.run(1, attention_jobs.attend, rows, tensors, lengths, None, recompute)[0] for recompute in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(kept, computed_again, strict=True))


def test_a_row_does_not_depend_on_what_it_is_packed_with(ranks):
    own, other = (dense_attention.random_qkv(LENGTHS, 4, 2, width=8, seed=seed) for seed in (0, 1))
    lengths = [40, *LENGTHS]
    tensors = [torch.cat([theirs[-40:], mine]) for theirs, mine in zip(other, own, strict=True)]
    alone, beside = (
        ranks.run(2, attention_jobs.attend, [rows_of(r, 2, sizes) for r in range(2)], data, sizes, None, False)
        for data, sizes in ((own, LENGTHS), (tensors, lengths))
    )
    for one, two in zip(alone, beside, strict=True):
        assert all(torch.equal(a, b[20:]) for a, b in zip(one, two, strict=True))
