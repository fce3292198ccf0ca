"""Which sequence goes to which rank and micro-batch: planning over lengths and costs alone.

Costs are balanced over the ranks first. Then each rank packs its own sequences into as many micro-batches as the others,
so that those of one number cost the same on all ranks. Several plans are made this way, and the fastest is kept.
"""

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np

Groups = list[list[int]]
Plan = list[Groups]
"""[rank][micro-batch] -> indices of sequences."""

MICRO_BATCH_COST = 0.03
"""What a micro-batch costs whatever is in it, as a share of a full one without attention: weights and gradients are
read and written, kernels started, exchanges begun. An estimate for 16k tokens of a 30B mixture of experts on H100s."""


def plan_micro_batches(
    lengths: Sequence[int],
    costs: Sequence[float],
    *,
    ranks: int,
    token_budget: int,
    count_multiple: int = 1,
    minimum_count: int = 1,
) -> Plan:
    """Distribute sequences over ranks and micro-batches.

    There are as few micro-batches as a best-fit packing needs, rounded up so that all ranks have as many. Where that
    leaves no room to level their costs, the next number is tried too. The fastest plan is taken: see `_step_time`.

    Args:
        lengths: positions of each sequence, all > 0. One longer than `token_budget` gets a micro-batch of its own.
        costs: of each sequence; a longer sequence must not cost less than a shorter one.
        count_multiple, minimum_count: of each rank's micro-batches.

    Returns:
        [rank][micro-batch] -> indices into `lengths`, ascending; each index occurs once. A micro-batch is empty only if
        there are fewer sequences than micro-batches. Those of one number cost about the same on all ranks; the cheapest
        come first and last. Equal input gives equal output.

    Raises:
        ValueError: no sequences, or one without positions.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("sequences of at least one position are needed")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # From here on an index counts sequences from the longest: ascending order is longest first.
    lengths, costs = [lengths[i] for i in order], [costs[i] for i in order]
    fewest = max(minimum_count, -(-len(_best_fit(range(len(order)), lengths, token_budget)) // ranks))
    fewest = -(-fewest // count_multiple) * count_multiple
    shares = _shares(lengths, costs, ranks)
    plans: list[Plan] = []
    for count in itertools.count(fewest, count_multiple):
        level = _level_plans(shares, lengths, costs, token_budget, count)
        plans += level or _tight_plans(shares, lengths, token_budget, count)
        if level or (plans and count > fewest):
            break
    plan = min(plans, key=lambda plan: _step_time(plan, costs, token_budget))
    _occupy_empty(plan)
    return [[sorted(order[i] for i in group) for group in _small_at_the_ends(groups, costs)] for groups in plan]


def largest_differencing(costs: Sequence[float], ranks: int) -> Groups:
    """Karmarkar and Karp's method for `ranks` groups of equal size (to within one): indices of each group.

    Sorted costs are cut into rows of `ranks`. The two rows with the largest spread are merged, the most expensive of
    the one with the cheapest of the other, until one is left.
    """
    values = np.append(np.asarray(costs, dtype=np.float64), 0.0)  # the last is a blank that fills up the last row
    order = np.argsort(-values[:-1], kind="stable")
    rows = np.append(order, np.full(-len(order) % ranks, len(costs))).reshape(-1, ranks)
    heap = [(values[row[-1]] - values[row[0]], number, values[row], row[None]) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    for number in range(len(heap), 2 * len(heap) - 1):
        _, _, sums, members = heapq.heappop(heap)
        _, _, other_sums, other_members = heapq.heappop(heap)
        sums = sums + other_sums[::-1]
        members = np.concatenate([members, other_members[:, ::-1]])
        descending = np.argsort(-sums, kind="stable")
        sums = sums[descending]
        heapq.heappush(heap, (sums[-1] - sums[0], number, sums, members[:, descending]))
    return [[i for i in group if i < len(costs)] for group in heap[0][3].T.tolist()]


def _shares(lengths: Sequence[int], costs: Sequence[float], ranks: int) -> list[Groups]:
    """One or two ways to balance costs over the ranks: each rank's sequences, longest first.

    Differencing balances best where all ranks may have as many sequences; where some outweigh many others, longest
    first is better.
    """
    equal_counts = [sorted(own) for own in largest_differencing(costs, ranks)]
    any_counts = _longest_first(range(len(costs)), lengths, costs, sum(lengths), [0.0] * ranks)
    better = _largest_sum(any_counts, costs) < _largest_sum(equal_counts, costs)
    return [equal_counts, any_counts] if better else [equal_counts]


def _level_plans(
    shares: list[Groups], lengths: Sequence[int], costs: Sequence[float], token_budget: int, count: int
) -> list[Plan]:
    """Each micro-batch costs about what those of its number cost on the other ranks; without plans that don't fit."""
    plans = [
        [_longest_first(own, lengths, costs, token_budget, [-cost for cost in profile]) for own in share]
        for share in shares
        for profile in _profiles(share, costs, count)
    ]
    return [plan for plan in plans if all(plan)]


def _tight_plans(shares: list[Groups], lengths: Sequence[int], token_budget: int, count: int) -> list[Plan]:
    """Best fit, whatever the micro-batches then cost; without plans in which some rank needs more than `count`."""
    plans = [[_best_fit(own, lengths, token_budget) for own in share] for share in shares]
    return [
        [groups + [[] for _ in range(count - len(groups))] for groups in plan]
        for plan in plans
        if max(map(len, plan)) <= count
    ]


def _profiles(share: Groups, costs: Sequence[float], count: int) -> list[list[float]]:
    """What the micro-batches of every rank should cost, descending.

    A sequence that alone outweighs an average micro-batch makes the other ranks wait in any case: they may do as much
    in that time, and the rest is spread evenly over the other micro-batches. Or all are as even as they can be.
    """
    largest = [0.0] * count
    for own in share:
        for number, index in enumerate(own[:count]):
            largest[number] = max(largest[number], costs[index])
    whole = _largest_sum(share, costs)
    for dominated in range(count):
        even = (whole - sum(largest[:dominated])) / (count - dominated)
        if even >= largest[dominated]:
            largest[dominated:] = [even] * (count - dominated)
            break
    return [largest] if largest[0] == largest[-1] else [largest, [0.0] * count]


def _longest_first(
    indices: Iterable[int], lengths: Sequence[int], costs: Sequence[float], token_budget: int, loads: list[float]
) -> Groups:
    """Each sequence to the group with the least load (what it begins with, and costs) that has room; [] if none has."""
    groups: Groups = [[] for _ in loads]
    room = [max(token_budget, lengths[0])] * len(loads)  # an empty group has room for the longest of all
    open_groups = sorted((load, number) for number, load in enumerate(loads))
    # Too full for the last sequence, but not for shorter ones: (-room, load, number).
    waiting: list[tuple[int, float, int]] = []
    for index in indices:
        length = lengths[index]
        while waiting and -waiting[0][0] >= length:
            heapq.heappush(open_groups, heapq.heappop(waiting)[1:])
        while open_groups and room[open_groups[0][1]] < length:
            load, number = heapq.heappop(open_groups)
            heapq.heappush(waiting, (-room[number], load, number))
        if not open_groups:
            return []
        load, number = open_groups[0]
        room[number] = (room[number] if groups[number] else token_budget) - length
        groups[number].append(index)
        heapq.heapreplace(open_groups, (load + costs[index], number))
    return groups


def _best_fit(indices: Iterable[int], lengths: Sequence[int], token_budget: int) -> Groups:
    """Each sequence to the fullest group in which it fits; a new one where there is none."""
    groups: Groups = []
    room: list[tuple[int, int]] = []  # (tokens, number of the group), ascending
    for index in indices:
        place = bisect_left(room, (lengths[index], 0))
        if place == len(room):
            tokens, number = token_budget, len(groups)
            groups.append([])
        else:
            tokens, number = room.pop(place)
        groups[number].append(index)
        insort(room, (tokens - lengths[index], number))
    return groups


def _occupy_empty(plan: Plan) -> None:
    """Give each empty micro-batch the cheapest sequence of one that has several: of the same rank, or else another."""
    everywhere = [group for groups in plan for group in groups]
    for groups in plan:
        for empty in (group for group in groups if not group):
            donor = max(groups, key=len)
            donor = donor if len(donor) > 1 else max(everywhere, key=len)
            if len(donor) > 1:
                donor.sort()
                empty.append(donor.pop())


def _small_at_the_ends(groups: Groups, costs: Sequence[float]) -> Groups:
    """While a pipeline fills and drains, its stages wait for the first and the last micro-batches: the small ones."""
    descending = _descending(groups, costs)
    return descending[::2][::-1] + descending[1::2]


def _descending(groups: Groups, costs: Sequence[float]) -> Groups:
    return sorted(groups, key=lambda group: -sum(costs[i] for i in group))


def _step_time(plan: Plan, costs: Sequence[float], token_budget: int) -> float:
    """In units of cost: the mean of what it takes if ranks wait after every micro-batch, and if at the end alone."""
    cost = np.array([[sum(costs[i] for i in group) for group in _descending(groups, costs)] for groups in plan])
    return float(cost.max(0).sum() + cost.sum(1).max()) / 2 + MICRO_BATCH_COST * token_budget * cost.shape[1]


def _largest_sum(groups: Groups, costs: Sequence[float]) -> float:
    return max(sum(costs[i] for i in group) for group in groups)
