"""Order, packing, micro-batches, data-parallel and context-parallel ranks: the same loss, gradient and metrics."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_batches import LENGTHS, Batch, batch, loss_and_gradient
from published_objectives import OBJECTIVES

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.aggregation import local_count

AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length")
KERNELS = ("vespo", "grpo", "gspo", "sapo", "cispo", "topr")


def config(kernel, aggregation="token_mean", **further):
    length = {"constant_length": 8} if aggregation == "constant_length" else {}
    return ObjectiveConfig(kernel=OBJECTIVES[kernel][0], aggregation=aggregation, **length, **further)


def whole_count(settings_, data):
    return local_count(settings_.aggregation, data.response_mask, data.cu_seqlens).clamp(min=1)


def positions(data, order):
    bounds = data.bounds()
    return torch.tensor([t for i in order for t in range(*bounds[i])], dtype=torch.long)


@given(
    st.sampled_from(KERNELS),
    st.sampled_from(AGGREGATIONS),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_any_order_and_any_split_give_the_same_step(kernel, aggregation, lengths, seed, random, parts):
    data, settings_ = batch(seed, tuple(lengths)), config(kernel, aggregation)
    loss, gradient, metrics = loss_and_gradient(settings_, data)

    order = list(range(len(lengths)))
    random.shuffle(order)
    micro_batches = [order[part::parts] for part in range(parts) if order[part::parts]]
    total, pieces = torch.zeros((), dtype=torch.float64), torch.empty_like(gradient)
    sums, sequences = {}, {name: torch.empty_like(values) for name, values in metrics.sequences.items()}
    for some in micro_batches:
        part_loss, part_gradient, part_metrics = loss_and_gradient(
            settings_, data.taken(some), denominator=whole_count(settings_, data)
        )
        total += part_loss
        pieces[positions(data, some)] = part_gradient
        for name, value in part_metrics.sums.items():
            sums[name] = sums.get(name, 0) + value
        for name, values in part_metrics.sequences.items():
            sequences[name][some] = values
    torch.testing.assert_close(total, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pieces, gradient, rtol=1e-10, atol=1e-12)
    for name, value in metrics.sums.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-9, atol=1e-9)
    for name, values in metrics.sequences.items():
        torch.testing.assert_close(sequences[name], values, rtol=1e-6, atol=1e-9)


def in_two_ranks(call):
    """`call(rank, group)` in two threads, with a real gloo group between them."""
    store, answers, errors = dist.HashStore(), [None, None], []

    def run(rank):
        try:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
            options._timeout = timedelta(seconds=30)
            answers[rank] = call(rank, dist.ProcessGroupGloo(store, rank, 2, options))
        except Exception as error:  # the other thread must not be left without a word
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, errors


def dealt(data, rank):
    """Every second position of each sequence, as (its indices, the batch of one context-parallel rank)."""
    own = [torch.arange(a, b)[rank::2] for a, b in data.bounds()]
    chosen = torch.cat(own)
    advantages = data.advantages if len(data.advantages) == len(data.lengths) else data.advantages[chosen]
    lengths = tuple(len(some) for some in own)
    return chosen, Batch(
        lengths, data.log_probs[chosen], data.old_log_probs[chosen], advantages, data.response_mask[chosen]
    )


@pytest.mark.parametrize("of_tokens", [False, True], ids=["per_sequence", "per_token"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kernel", ["vespo", "grpo", "gspo_token", "topr"])
def test_context_parallel_ranks_are_one(kernel, aggregation, of_tokens):
    data, settings_ = batch(5, tuple(2 * n for n in LENGTHS)), config(kernel, aggregation)
    data = data.with_token_advantages() if of_tokens else data
    loss, gradient, metrics = loss_and_gradient(settings_, data)

    def one_rank(rank, group):
        chosen, own = dealt(data, rank)
        count = local_count(settings_.aggregation, own.response_mask, own.cu_seqlens, group)
        return chosen, count, loss_and_gradient(settings_, own, denominator=1, context_parallel_group=group)

    answers, errors = in_two_ranks(one_rank)
    assert not errors
    denominator = sum(count for _, count, _ in answers)
    assert denominator == whole_count(settings_, data)
    pieces = torch.empty_like(gradient)
    for chosen, _, (_, part, _) in answers:
        pieces[chosen] = part / denominator
    torch.testing.assert_close(sum(part for _, _, (part, _, _) in answers) / denominator, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pieces, gradient, rtol=1e-10, atol=1e-12)
    for name, value in metrics.sums.items():
        torch.testing.assert_close(sum(m.sums[name] for _, _, (_, _, m) in answers), value, rtol=1e-9, atol=1e-9)
    for _, _, (_, _, part_metrics) in answers:
        for name, values in metrics.sequences.items():
            torch.testing.assert_close(part_metrics.sequences[name], values, rtol=1e-6, atol=1e-9)


def test_context_parallel_ranks_fail_together():
    """The bad log-prob is on one rank; were the other to go on, it would wait for ever."""
    data = batch(5, (4, 6))
    data.response_mask[:] = True
    data.old_log_probs[4] = -torch.inf

    def one_rank(rank, group):
        _, own = dealt(data, rank)
        return loss_and_gradient(ObjectiveConfig(), own, context_parallel_group=group)

    _, errors = in_two_ranks(one_rank)
    assert [str(error)[:12] for error in errors] == ["trajectory 1"] * 2
