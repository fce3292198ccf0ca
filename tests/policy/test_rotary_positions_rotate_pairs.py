"""Rotary positions turn each pair of a head's halves by its row's angle, on the rows that a rank holds."""

import pytest
import torch
from zigzag import rows_of

from megatron_vespo.policy.rotary import rotate_packed

LENGTHS = [8, 24, 16]
WIDTH = 8


class Group:
    """Of a process group what is asked here."""

    def __init__(self, size: int, rank: int):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def angles(base: float = 100.0) -> torch.Tensor:
    """[longest, width / 2] float64"""
    return torch.outer(torch.arange(max(LENGTHS)), base ** -(torch.arange(0, WIDTH, 2).double() / WIDTH))


def turned(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers (a + bi) times exp(i angle), in float64; all rows."""
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    by_row = torch.cat([angles()[:length] for length in LENGTHS])[:, None]
    result = pairs * torch.polar(torch.ones_like(by_row), by_row)
    return torch.cat([result.real, result.imag], dim=-1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 3])
def test_values_and_gradients(ranks, heads):
    torch.manual_seed(0)
    x, gradient = (torch.randn(sum(LENGTHS), heads, WIDTH) for _ in range(2))
    x.requires_grad_()
    whole = turned(x)
    (whole_gradient,) = torch.autograd.grad(whole, x, gradient.double())
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    freqs = torch.cat([angles(), angles()], dim=-1).float()[:, None, None]
    for rank in range(ranks):
        own = rows_of(rank, ranks, LENGTHS)
        mine = x[own].detach().requires_grad_()
        found = rotate_packed(mine, bounds, freqs, mscale=1.5, cp_group=Group(ranks, rank))
        torch.testing.assert_close(found.double(), 1.5 * whole[own], atol=1e-5, rtol=0)
        (found_gradient,) = torch.autograd.grad(found, mine, gradient[own])
        torch.testing.assert_close(found_gradient, 1.5 * whole_gradient[own], atol=1e-5, rtol=0)


def test_the_next_micro_batch_has_its_own_angles():
    freqs = torch.cat([angles(), angles()], dim=-1).float()[:, None, None]
    x = torch.ones(24, 1, WIDTH)
    one, two = (rotate_packed(x, torch.tensor(bounds), freqs, cp_group=Group(1, 0)) for bounds in ([0, 24], [0, 8, 24]))
    assert torch.equal(one[:8], two[:8])
    assert torch.equal(one[:16], two[8:])
    assert not torch.equal(one[8:], two[8:])
