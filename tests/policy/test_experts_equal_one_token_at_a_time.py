"""Grouped experts: each token through its own expert, gradients included, also where an expert has none."""

import experts_jobs
import torch
import torch.nn.functional as F

CASES = [
    ((16, 8), [3, 0, 5, 1], torch.float32),
    ((16, 8), [0, 0, 0, 0], torch.float32),
    ((16, 8), [4], torch.float32),
    ((6, 5), [2, 0, 3], torch.float32),  # rows that torch's grouped product refuses
    ((16, 8), [3, 0, 5, 1], torch.bfloat16),
]


def draw(shape, counts, dtype):
    hidden, inner = shape
    count, tokens = len(counts), sum(counts)
    first = torch.randn(count, 2 * inner, hidden) / hidden**0.5
    second = torch.randn(count, hidden, inner) / inner**0.5
    matrices = [list(first.to(dtype)), list(second.to(dtype))]
    return (
        *matrices,
        counts,
        torch.randn(tokens, hidden).to(dtype),
        torch.rand(tokens),
        torch.randn(tokens, hidden).to(dtype),
    )


def one_by_one(first, second, counts, tokens, gates, gradient):
    """As the job's answer, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (tokens, gates, torch.stack(first), torch.stack(second))]
    x, gate, into, out_of = leaves
    outputs = []
    for number, expert in enumerate(e for e, count in enumerate(counts) for _ in range(count)):
        gated, linear = (into[expert] @ x[number]).chunk(2)
        outputs.append(out_of[expert] @ (F.silu(gated) * linear) * gate[number])
    if not outputs:
        return [torch.zeros_like(leaf) for leaf in (x, *leaves)]
    output = torch.stack(outputs)
    return [output, *torch.autograd.grad(output, leaves, gradient.double())]


def test_output_and_gradients(ranks):
    torch.manual_seed(0)
    cases = [draw(*case) for case in CASES]
    answers = ranks.run(1, experts_jobs.run_experts, cases)[0]
    for (_, _, dtype), case, answer in zip(CASES, cases, answers, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        for found, expected in zip(answer, one_by_one(*case), strict=True):
            assert found.isfinite().all()
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
