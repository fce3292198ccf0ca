"""The output layer split over two tensor-parallel ranks gives what the whole layer gives in float64."""

import head_examples
import pytest
import torch


def two_ranks(ranks, call, chunk_tokens=2, with_entropy=True):
    """The answers of both, and both as one: partial gradients of hidden added, rows of the weight put together."""
    answers = ranks.run(2, head_examples.chunked_on_rank, call, chunk_tokens, with_entropy)
    whole = head_examples.Scores(
        answers[0].log_probs,
        answers[0].entropy,
        sum(answer.grad_hidden for answer in answers),
        torch.cat([answer.grad_weight for answer in answers]),
    )
    return answers, whole


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    ("vocab_size", "padded"),
    [
        pytest.param(151_936, 152_064, id="Qwen3"),
        pytest.param(97, 98, id="odd"),
        pytest.param(70, 128, id="second rank nearly all padding"),
        pytest.param(50, 128, id="second rank all padding"),
    ],
)
def test_values_and_gradients(ranks, vocab_size, padded, with_entropy):
    call = head_examples.inputs(5, 16, vocab_size, padded, temperature=0.7)
    call.labels[2:4] = torch.tensor([padded // 2 - 1, padded // 2]).clamp(max=vocab_size - 1)
    _, whole = two_ranks(ranks, call, with_entropy=with_entropy)
    head_examples.assert_close(whole, head_examples.exact(call, with_entropy), with_entropy)
    assert torch.all(whole.grad_weight[vocab_size:] == 0.0)


def test_both_ranks_give_the_same_bits_and_talk_once(ranks):
    answers, _ = two_ranks(ranks, head_examples.inputs(33, 16, 9001, 9002), chunk_tokens=4)
    assert torch.equal(answers[0].log_probs, answers[1].log_probs)
    assert torch.equal(answers[0].entropy, answers[1].entropy)
    assert [answer.collectives for answer in answers] == [1, 1]


def test_bfloat16(ranks):
    """Logits of small integers are exact in bfloat16."""
    call = head_examples.inputs(9, 16, 97, 98)
    call.hidden, call.weight = (x.round().clamp(-2, 2).bfloat16() for x in (call.hidden, call.weight))
    _, whole = two_ranks(ranks, call)
    expected = head_examples.exact(call)
    torch.testing.assert_close(whole.log_probs.double(), expected.log_probs, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(whole.entropy.double(), expected.entropy, atol=1e-5, rtol=1e-6)
    for name in ("grad_hidden", "grad_weight"):
        goal = getattr(expected, name)
        assert (getattr(whole, name).double() - goal).norm() < 1e-2 * goal.norm()
