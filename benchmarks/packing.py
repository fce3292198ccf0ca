"""How well a step's trajectories are packed, against Karmarkar-Karp as verl and slime use it, and how fast.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --out results/packing.json

The peers' schedules are written anew from their sources (verl b178a3cd, verl/utils/seqlen_balancing.py and
trainer/ppo/ray_trainer.py; slime 624b824a, slime/utils/dp_schedule.py). All balance the same cost, so that only the
schedules are compared. This fails if, in the steps shown one by one, ours has less fill or a worse balance of the ranks
than a peer that keeps the budget. Times are of the process's CPU, since the machine may be shared.
"""

import argparse
import heapq
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from megatron_vespo.packing.balance import plan_micro_batches
from megatron_vespo.packing.batch import TrainingSequence
from megatron_vespo.packing.steps import PackingRules, pack_step, report_packing

TRAJECTORIES, LONGEST = 2048, 16384
LAYOUTS = ((8, 16384), (8, 32768), (64, 16384), (64, 32768))
"""Data-parallel ranks, positions of a micro-batch."""
ATTENTION_COST = 48 * 32 * 128 / 3.04e9
"""Of Qwen3-30B-A3B: layers * heads * head size over the matrix parameters that a token meets."""
CONTEXT_PARALLEL = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (4, 4))
"""Context- and tensor-parallel ranks (with sequence parallelism)."""
REPETITIONS = 15
TOLERANCE = 1e-5
"""A rank that has a hundred-thousandth more to do than another is as good as even."""
VOCABULARY = 151_936


def distributions(longest: int, count: int = TRAJECTORIES, draw: int = 0) -> dict[str, list[int]]:
    random = np.random.default_rng(draw)
    tail = np.exp(random.normal(np.log(longest / 10), 1.0, count)).astype(int) + 1
    giant = random.integers(longest // 40, longest // 20, count)
    giant[count // 3] = longest
    return {
        "uniform": random.integers(1, longest + 1, count).tolist(),
        "long tail": np.minimum(tail, longest).tolist(),
        "one giant": giant.tolist(),
        "all equal": [longest // 8 + 1] * count,
    }


def karmarkar_karp(values: list[float], groups: int, equal_counts: bool) -> list[list[int]]:
    """Largest differencing, on tuples of `groups` values where counts must be equal, else on single ones."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    width = groups if equal_counts else 1
    states = []
    for number, start in enumerate(range(0, len(order), width)):
        sets = [(values[i], [i]) for i in order[start : start + width]]
        sets = sorted(sets + [(0, [])] * (groups - len(sets)), key=lambda one: -one[0])
        states.append((sets[-1][0] - sets[0][0], number, sets))
    heapq.heapify(states)
    for number in range(len(states), 2 * len(states) - 1):
        one, other = heapq.heappop(states)[2], heapq.heappop(states)[2]
        sets = [(a + b, left + right) for (a, left), (b, right) in zip(one, reversed(other), strict=True)]
        sets.sort(key=lambda one: -one[0])
        heapq.heappush(states, (sets[-1][0] - sets[0][0], number, sets))
    return [sorted(members) for _, members in states[0][2]]


def verl(lengths: list[int], costs: list[float], ranks: int, budget: int, keep_budget: bool) -> list:
    """Costs over the ranks, then over as many micro-batches as the tokens need at least.

    What then exceeds the budget is left so; `keep_budget`: more micro-batches, until nothing does.
    """
    shares = karmarkar_karp(costs, ranks, equal_counts=True)
    count = max(-(-sum(lengths[i] for i in share) // budget) for share in shares)
    while True:
        plan = []
        for share in shares:
            groups = karmarkar_karp([costs[i] for i in share], count, equal_counts=False)
            groups = [[share[j] for j in group] for group in groups]
            groups.sort(key=lambda group: -sum(costs[i] for i in group))
            plan.append(groups[::2][::-1] + groups[1::2])
        if not keep_budget or overflow(plan, lengths, budget) <= 1:
            return plan
        count += 1


def slime(lengths: list[int], costs: list[float], ranks: int, budget: int, by_flops: bool) -> list:
    """First fit into micro-batches, then those over the ranks. `by_flops`: micro-batches balanced, budget or not."""
    if by_flops:
        groups = karmarkar_karp(costs, -(-sum(lengths) // budget), equal_counts=False)
    else:
        groups = first_fit(lengths, budget)
    while len(groups) % ranks:
        largest = max((g for g in groups if len(g) > 1), key=lambda group: sum(lengths[i] for i in group))
        groups.remove(largest)
        halves: list[list[int]] = [[], []]
        for index in sorted(largest, key=lambda i: -lengths[i]):
            min(halves, key=lambda half: sum(lengths[i] for i in half)).append(index)
        groups += halves
    dealt = karmarkar_karp([sum(costs[i] for i in group) for group in groups], ranks, equal_counts=True)
    return [[groups[number] for number in numbers] for numbers in dealt]


def first_fit(lengths: list[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        number = next((n for n, left in enumerate(room) if left >= length), None)
        if number is None:
            number = len(groups)
            groups.append([])
            room.append(budget)
        groups[number].append(index)
        room[number] -= length
    return groups


def ours(lengths: list[int], costs: list[float], ranks: int, budget: int) -> list:
    return plan_micro_batches(lengths, costs, ranks=ranks, token_budget=budget)


KEEP_THE_BUDGET = {
    "ours": ours,
    "verl, budget kept": lambda *step: verl(*step, keep_budget=True),
    "slime": lambda *step: slime(*step, by_flops=False),
}
SCHEDULES = KEEP_THE_BUDGET | {
    "verl": lambda *step: verl(*step, keep_budget=False),
    "slime, balance by FLOPs": lambda *step: slime(*step, by_flops=True),
}


def overflow(plan: list, lengths: list[int], budget: int) -> float:
    """Positions of the fullest micro-batch over the budget."""
    return max(sum(lengths[i] for i in group) for groups in plan for group in groups) / budget


def figures(plan: list, lengths: list[int], costs: list[float], budget: int) -> dict:
    cost = np.array([[sum(costs[i] for i in group) for group in groups] for groups in plan])
    mean = cost.sum() / len(plan)
    return {
        "micro_batches": len(plan[0]),
        "fill": round(sum(lengths) / (cost.size * budget), 6),
        "fullest": round(overflow(plan, lengths, budget), 6),
        "rank_balance": round(mean / cost.sum(1).max(), 6),
        "step_balance": round(mean / cost.max(0).sum(), 6),
    }


def compare(lengths: list[int], ranks: int, budget: int, schedules: dict) -> dict[str, dict]:
    costs = [n + ATTENTION_COST * n**2 for n in lengths]
    return {
        name: figures(plan(lengths, costs, ranks, budget), lengths, costs, budget) for name, plan in schedules.items()
    }


def worse_than_a_peer(found: dict[str, dict]) -> list[str]:
    return [
        f"{name} has {figure} {found[name][figure]:.6f}, ours {found['ours'][figure]:.6f}"
        for name in KEEP_THE_BUDGET
        for figure in ("fill", "rank_balance")
        if found["ours"][figure] < found[name][figure] - TOLERANCE
    ]


def over_draws(draws: int) -> dict:
    """Where ours was worse than a peer in some figure, over steps of two sizes, drawn anew."""
    steps = [
        (f"draw {draw}, {count} trajectories, {ranks} ranks, {budget} positions, {name}", lengths, ranks, budget)
        for draw in range(draws)
        for count in (TRAJECTORIES, TRAJECTORIES // 4)
        for ranks, budget in LAYOUTS
        for name, lengths in distributions(LONGEST, count, draw).items()
    ]
    worse = {step: worse_than_a_peer(compare(*rest, KEEP_THE_BUDGET)) for step, *rest in steps}
    return {"steps": len(steps), "worse": {step: problems for step, problems in worse.items() if problems}}


def sequences_of(lengths: list[int]) -> list[TrainingSequence]:
    random = np.random.default_rng(1)
    return [
        TrainingSequence(
            token_ids=random.integers(0, VOCABULARY, n + 1).astype(np.int32),
            label_mask=np.ones(n, dtype=np.bool_),
            old_log_probs=np.zeros(n, dtype=np.float32),
            advantage=1.0,
            key=key,
        )
        for key, n in enumerate(lengths)
    ]


def seconds(call) -> list[float]:
    taken = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return taken


def milliseconds(taken: list[float]) -> dict[str, float]:
    return {"least": round(1e3 * min(taken), 2), "median": round(1e3 * statistics.median(taken), 2)}


def speed(lengths: list[int], ranks: int, budget: int) -> dict:
    """Milliseconds of planning alone, and of planning and building all tensors."""
    sequences = sequences_of(lengths)
    rules = PackingRules(ranks=ranks, token_budget=budget, attention_cost=ATTENTION_COST)
    costs = [rules.cost(n) for n in lengths]
    plan, everything = (
        seconds(lambda: ours(lengths, costs, ranks, budget)),
        seconds(lambda: pack_step(sequences, rules)),
    )
    return {
        "positions": sum(lengths),
        "plan_ms": milliseconds(plan),
        "pack_step_ms": milliseconds(everything),
    }


def waste(lengths: list[int], cp: int, tp: int, equal_totals: bool) -> dict:
    """Shares of the positions of a step that are padding and fillers, on 8 ranks with 16k positions a micro-batch."""
    rules = PackingRules(
        ranks=8,
        token_budget=16384,
        segment_multiple=2 * cp if cp > 1 else 1,
        total_multiple=cp * tp,
        equal_totals=equal_totals,
        attention_cost=ATTENTION_COST,
    )
    report = report_packing(pack_step(sequences_of(lengths), rules), rules)
    return {
        "padding": round(report.padding_positions / report.positions, 6),
        "filler": round(report.filler_positions / report.positions, 6),
    }


def show(results: dict) -> None:
    for row in results["quality"]:
        print(f"\n{row['ranks']} ranks, {row['token_budget']} positions, {row['distribution']}")
        for name, found in row["schedules"].items():
            print(
                f"  {name:24} micro-batches {found['micro_batches']:4}  fill {found['fill']:.4f}  fullest "
                f"{found['fullest']:.4f}  rank balance {found['rank_balance']:.5f}  step balance {found['step_balance']:.4f}"
            )
    print(
        f"\n{len(results['draws']['worse'])} of {results['draws']['steps']} steps were worse packed than by some peer:"
    )
    for step, problems in results["draws"]["worse"].items():
        print(f"  {step}: {', '.join(problems)}")
    print()
    for row in results["speed"]:
        print(
            f"{row['ranks']} ranks, {row['token_budget']} positions, longest {row['longest']}, {row['distribution']:10} "
            f"{row['positions'] / 1e6:5.1f}M positions: plan {row['plan_ms']['least']:5.1f} ms, plan and tensors "
            f"{row['pack_step_ms']['least']:5.1f} ms (medians {row['plan_ms']['median']:.1f}, "
            f"{row['pack_step_ms']['median']:.1f})"
        )
    print()
    for row in results["waste"]:
        print(
            f"cp {row['cp']} tp {row['tp']} equal totals {row['equal_totals']!s:5} {row['distribution']:10} "
            f"padding {row['padding']:.3%} fillers {row['filler']:.3%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=5, help="how many times lengths are drawn for the count of steps")
    options = parser.parse_args()
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "trajectories": TRAJECTORIES,
        "attention_cost": ATTENTION_COST,
        "quality": [
            {
                "ranks": ranks,
                "token_budget": budget,
                "distribution": name,
                "schedules": compare(lengths, ranks, budget, SCHEDULES),
            }
            for ranks, budget in LAYOUTS
            for name, lengths in distributions(LONGEST).items()
        ],
        "draws": over_draws(options.draws),
        "speed": [
            {"ranks": ranks, "token_budget": budget, "longest": longest, "distribution": name}
            | speed(lengths, ranks, budget)
            for ranks, budget in (LAYOUTS[0], LAYOUTS[-1])
            for longest in (LONGEST // 4, LONGEST)
            for name, lengths in distributions(longest).items()
        ],
        "waste": [
            {"cp": cp, "tp": tp, "equal_totals": equal_totals, "distribution": name}
            | waste(lengths, cp, tp, equal_totals)
            for cp, tp in CONTEXT_PARALLEL
            for equal_totals in (False, True)
            for name, lengths in distributions(LONGEST // 4).items()
        ],
    }
    show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    problems = [
        f"{row['ranks']} ranks, {row['token_budget']} positions, {row['distribution']}: {problem}"
        for row in results["quality"]
        for problem in worse_than_a_peer(row["schedules"])
    ]
    if problems:
        raise SystemExit("\n".join(["worse than a peer that keeps the budget:", *problems]))


if __name__ == "__main__":
    main()
