"""Which sequence goes to which rank and micro-batch. Pure: nothing here knows of processes or devices."""

import heapq

import numpy as np

from megatron_vespo.policy.batch import MicroBatch, TrainingSequence, pack

FILLER_KEY = -1


def pack_step(sequences: list[TrainingSequence], ranks: int, token_budget: int) -> list[list[MicroBatch]]:
    """The micro-batches of one step, [rank][micro-batch]; as many on each rank. See `plan_micro_batches`."""
    plan = plan_micro_batches([len(s.token_ids) - 1 for s in sequences], ranks, token_budget)
    filler = filler_of(sequences[0])
    return [[pack([sequences[i] for i in indices] or [filler]) for indices in per_rank] for per_rank in plan]


def filler_of(sequence: TrainingSequence) -> TrainingSequence:
    """One position that does not count, of tokens that the vocabulary has."""
    return TrainingSequence(
        token_ids=sequence.token_ids[:2],
        label_mask=np.zeros(1, dtype=np.bool_),
        old_log_probs=np.zeros(1, dtype=np.float32),
        advantage=0.0,
        key=FILLER_KEY,
    )


def plan_micro_batches(lengths: list[int], ranks: int, token_budget: int) -> list[list[list[int]]]:
    """Distribute sequences over ranks, then pack each rank's into micro-batches of at most `token_budget` tokens.

    Every rank gets the same number of micro-batches, since expert parallelism and Megatron's schedule make the ranks
    walk in step. Longest first: to the rank with the fewest tokens so far, then into the micro-batch with the fewest
    tokens that it fits in. A sequence longer than the budget has a micro-batch of its own. Equal input gives equal
    output.

    Args:
        lengths: positions of each sequence, all > 0.

    Returns:
        [rank][micro-batch] -> indices into `lengths`, ascending; each index occurs once. A micro-batch is empty
        (a filler) only where a rank has fewer sequences than the others have micro-batches.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("sequences of at least one position are needed")
    if ranks < 1 or token_budget < 1:
        raise ValueError(f"ranks and token_budget must be at least 1, found {ranks} and {token_budget}")
    per_rank = _to_ranks(lengths, ranks)
    count = max(1, *(-(-sum(lengths[i] for i in share) // token_budget) for share in per_rank))
    while True:
        bins = [_into_bins(lengths, share, count, token_budget) for share in per_rank]
        if all(packed is not None for packed in bins):
            return [[sorted(micro_batch) for micro_batch in packed] for packed in bins if packed is not None]
        count += 1


def _longest_first(lengths: list[int], indices: list[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-lengths[i], i))


def _to_ranks(lengths: list[int], ranks: int) -> list[list[int]]:
    loads = [(0, 0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in _longest_first(lengths, list(range(len(lengths)))):
        tokens, sequences, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (tokens + lengths[index], sequences + 1, rank))
    return shares


def _into_bins(lengths: list[int], share: list[int], count: int, token_budget: int) -> list[list[int]] | None:
    """None if they don't fit into `count` micro-batches."""
    loads = [(0, number) for number in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in _longest_first(lengths, share):
        tokens, number = heapq.heappop(loads)
        if tokens and tokens + lengths[index] > token_budget:
            return None
        bins[number].append(index)
        heapq.heappush(loads, (tokens + lengths[index], number))
    return bins
