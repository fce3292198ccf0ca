"""Each packed sequence attends to itself, causally, whatever it is packed with."""

import dense_attention
import pytest
import torch

from megatron_vespo.policy.attention import packed_causal_attention


@pytest.mark.parametrize("lengths", [[5], [7, 1, 12, 3], [1, 1, 1], [4, 4, 9, 4, 4, 4], [200, 33, 33]])
@pytest.mark.parametrize(("heads", "groups", "scale"), [(4, 4, None), (4, 2, None), (6, 1, 0.3)])
def test_output_and_gradients(lengths, heads, groups, scale):
    *qkv, gradient = dense_attention.random_qkv(lengths, heads, groups, width=8)
    leaves = [x.requires_grad_() for x in qkv]
    output = packed_causal_attention(*leaves, lengths, scale)
    found = torch.autograd.grad(output, leaves, gradient)
    expected, expected_gradients = dense_attention.dense_with_gradients(qkv, gradient, lengths, scale)
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
    for one, other in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


def test_a_sequence_has_the_same_bits_alone_and_beside_any_others():
    lengths = [40, 40, 40, 97, 1, 40]
    *qkv, gradient = dense_attention.random_qkv(lengths, 4, 2, width=16)

    def computed(tensors, output_gradient, sizes):
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = packed_causal_attention(*leaves, sizes)
        return [output, *torch.autograd.grad(output, leaves, output_gradient)]

    together = [x.split(lengths) for x in computed(qkv, gradient, lengths)]
    for number, length in enumerate(lengths):
        alone = computed([x.split(lengths)[number] for x in qkv], gradient.split(lengths)[number], [length])
        for packed, single in zip(together, alone, strict=True):
            assert torch.equal(packed[number], single), f"sequence {number} of {lengths}"
