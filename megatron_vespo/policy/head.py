"""Log-probabilities and entropy from hidden states through the output layer, without ever holding all logits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# With 1,024 tokens a block of float32 logits has 16 MB: it stays in a CPU's last cache level or an H100's L2, and below
# the size (32 MB) from which glibc maps, and zeroes, fresh pages for every tensor.
BLOCK_ROWS = 4096
ROUND_SIZE = 256


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at `labels`, and the softmax's entropy in nats.

    Differentiable in `hidden` and `weight`. Logits are computed in the dtype of `hidden`, everything after them in
    float32. At most `chunk_tokens` x 4,096 logits exist at a time (twice that with entropy), in the forward and,
    recomputed, in the backward pass. Ranks exchange numbers once, at the end of the forward pass.

    The gradient of `hidden` is this rank's partial sum, over its own rows of `weight`: whoever gathered or copied
    `hidden` to all ranks of `group` adds the partial sums up.

    Args:
        hidden: [t, h], the same on all ranks of `group`.
        weight: [v_local, h] of the dtype of `hidden`: rows rank * v_local to (rank + 1) * v_local - 1 of the output
            layer. Rows from `vocab_size` on are padding: never read, and their gradient is zero.
        labels: [t] int64, token ids of the whole vocabulary. One that is no real row has log-prob -inf.
        temperature: of sampling, > 0; both results are of the distribution at this temperature.
        chunk_tokens: > 0. The results for other values differ only by rounding.
        vocab_size: real rows, of all ranks together.
        group: the tensor-parallel ranks, or None where `weight` is the whole output layer.
        with_entropy: the gradients of both results may come back together, or of either alone.

    Returns:
        log_probs [t] and entropy [t] (or None), float32, equal on all ranks.
    """
    if group is not None and group.size() == 1:
        group = None
    first_id = len(weight) * dist.get_rank(group) if group is not None else 0
    real_rows = min(max(vocab_size - first_id, 0), len(weight))
    plan = _Plan(
        temperature, _slices(len(labels), chunk_tokens), _slices(real_rows, BLOCK_ROWS), first_id, group, with_entropy
    )
    return _TokenScores.apply(hidden, weight, labels, plan)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Plan:
    """How one call is cut: `chunks` of tokens times `blocks` of this rank's real rows, the first of id `first_id`."""

    temperature: float
    chunks: list[slice]
    blocks: list[slice]
    first_id: int
    group: dist.ProcessGroup | None
    with_entropy: bool

    def find_labels(self, labels: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """Column of each label in the block, [c, 1] (any column if it is not there), and whether it is there, [c]."""
        columns = labels - (self.first_id + block.start)
        last = block.stop - block.start - 1
        return columns.clamp(0, last)[:, None], (columns >= 0) & (columns <= last)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        # The summary of no columns at all: that of a rank with nothing but padding.
        summary = torch.full((2 + plan.with_entropy, len(labels)), -math.inf, device=hidden.device)
        summary[2:] = 0.0
        for chunk in plan.chunks if plan.blocks else []:
            # Allocated before any logits: small tensors left between large ones would fragment a CPU's heap.
            of_blocks = summary.new_empty(len(plan.blocks), *summary[:, chunk].shape)
            for index, block in enumerate(plan.blocks):
                of_blocks[index] = _summarise(hidden[chunk], weight[block], labels[chunk], block, plan)
            summary[:, chunk] = _combine(of_blocks)
        if plan.group is not None:
            summary = _combine(_gather(summary, plan.group))
        normaliser, label_logit, *rest = summary
        entropy = rest[0] if plan.with_entropy else None
        ctx.save_for_backward(hidden, weight, labels, normaliser, entropy)
        ctx.plan = plan
        return label_logit - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With p the softmax, H its entropy and T the temperature, the gradient of logit j before division by T is

        d log_prob / d logit_j = (1[j = label] - p_j) / T and d H / d logit_j = -p_j (log p_j + H) / T.
        """
        hidden, weight, labels, normaliser, entropy = ctx.saved_tensors
        plan: _Plan = ctx.plan
        scale = grad_outputs[0] / plan.temperature
        constant, slope = -scale, None
        if entropy is not None:
            slope = -grad_outputs[1] / plan.temperature
            constant += slope * entropy
        # Sums are in float32, whatever the dtype, so that they do not depend on the number of chunks or blocks. With
        # blocks outermost, only one block of the weight gradient is needed in float32.
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros_like(weight)
        for block in plan.blocks:
            rows = weight[block]
            grad_columns = torch.zeros(rows.T.shape, dtype=torch.float32, device=weight.device)
            for chunk in plan.chunks:
                log_p = _scaled_logits(hidden[chunk], rows, plan.temperature).sub_(normaliser[chunk, None])
                grad_logits = _times_softmax(log_p, constant[chunk], None if slope is None else slope[chunk])
                columns, found = plan.find_labels(labels[chunk], block)
                grad_logits.scatter_add_(1, columns, (scale[chunk] * found)[:, None])
                grad_logits = grad_logits.to(hidden.dtype)
                grad_hidden[chunk] += _product(grad_logits, rows)
                grad_columns += _product(hidden[chunk].T, grad_logits)
            grad_weight[block] = grad_columns.T
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _summarise(hidden: Tensor, rows: Tensor, labels: Tensor, block: slice, plan: _Plan) -> Tensor:
    """[2 or 3, c]: of the block's logits, their logsumexp, the label's (-inf if elsewhere), their softmax's entropy."""
    logits = _scaled_logits(hidden, rows, plan.temperature)
    columns, found = plan.find_labels(labels, block)
    label_logit = logits.gather(1, columns).squeeze(1).masked_fill_(~found, -math.inf)
    largest = logits.amax(dim=1)
    logits.sub_(largest[:, None])
    if not plan.with_entropy:
        return torch.stack([logits.exp_().sum(dim=1).log_().add_(largest), label_logit])
    odds = logits.exp()
    total = odds.sum(dim=1)
    log_total = total.log()
    # Both terms are at least zero, so nothing cancels.
    entropy = log_total - odds.mul_(logits).sum(dim=1).div_(total)
    return torch.stack([log_total.add_(largest), label_logit, entropy])


def _combine(summaries: Tensor) -> Tensor:
    """Summaries of disjoint sets of columns [n, 2 or 3, c] -> that of all of them together [2 or 3, c].

    The entropy is that of the choice of a set, plus the expected entropy within the chosen set.
    """
    normalisers = summaries[:, 0]
    normaliser = normalisers.logsumexp(dim=0)
    combined = [normaliser, summaries[:, 1].amax(dim=0)]
    if summaries.shape[1] == 3:
        share = (normalisers - normaliser).exp_()
        combined.append((torch.special.entr(share) + share * summaries[:, 2]).sum(dim=0))
    return torch.stack(combined)


def _gather(summary: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[k, t] of each rank -> [ranks, k, t], the same on all ranks."""
    gathered = torch.cat([torch.empty_like(summary)] * dist.get_world_size(group))
    dist.all_gather_into_tensor(gathered, summary, group=group)
    return gathered.view(-1, *summary.shape)


def _times_softmax(log_p: Tensor, constant: Tensor, slope: Tensor | None) -> Tensor:
    """p * (constant + slope * log p) of log_p [c, rows], which is overwritten; constant and slope [c]."""
    if slope is None:
        return log_p.exp_().mul_(constant[:, None])
    p = log_p.exp()
    return log_p.mul_(slope[:, None]).add_(constant[:, None]).mul_(p)


def _scaled_logits(hidden: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """A new float32 tensor, [c, rows]."""
    return _product(hidden, rows.T).float().div_(temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of matrices.

    For float32 on a CPU torch's matmul takes MKL, which on an AMD EPYC runs at half the speed of oneDNN, that comes
    with torch too. torch's compiler calls oneDNN by this operator; the public way, tensors in oneDNN's own layout,
    loses the gain in conversions. oneDNN keeps compiled code for each shape (about 0.5 MB), so it gets round sizes only:
    whole chunks and blocks, and not what is left of them, which differs from call to call.
    """
    round_sizes = all(size % ROUND_SIZE == 0 for size in (*left.shape, right.shape[1]))
    if (
        round_sizes
        and left.device.type == "cpu"
        and left.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return left @ right


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
