"""From the sequences of one step to the packed micro-batches of every data-parallel rank.

Pure: nothing here knows of processes or devices. A step is given whole, so its groups stay together; nothing is dropped,
and results are put back in order by keys. The loss divides by a count over the whole step, so how it is split here
changes no gradient.
"""

from dataclasses import dataclass

import numpy as np

from megatron_vespo.packing.balance import plan_micro_batches
from megatron_vespo.packing.batch import MicroBatch, TrainingSequence, pack
from megatron_vespo.packing.rules import PackingRules, round_up

FILLER_KEY = -1


def pack_step(sequences: list[TrainingSequence], rules: PackingRules) -> list[list[MicroBatch]]:
    """The micro-batches of one step, [rank][micro-batch]; as many on each rank. See `plan_micro_batches`.

    What a micro-batch lacks for `total_multiple` or `equal_totals` is one filler behind its sequences, which costs less
    attention than a longer sequence would. A micro-batch is a filler alone only where sequences are too few.

    Raises:
        ValueError: no sequences.
    """
    lengths = [rules.padded(sequence.positions) for sequence in sequences]
    plan = plan_micro_batches(
        lengths,
        [rules.cost(length) for length in lengths],
        ranks=rules.ranks,
        token_budget=rules.token_budget // rules.positions_multiple * rules.positions_multiple,
        count_multiple=rules.count_multiple,
        minimum_count=rules.minimum_count,
    )
    used = [[sum(lengths[i] for i in indices) for indices in per_rank] for per_rank in plan]
    totals = [[round_up(max(positions, 1), rules.positions_multiple) for positions in per_rank] for per_rank in used]
    if rules.equal_totals:
        totals = [[max(map(max, totals))] * len(per_rank) for per_rank in totals]
    return [
        [
            _with_filler([sequences[i] for i in indices], sequences[0], total - positions, rules)
            for indices, total, positions in zip(*of_rank, strict=True)
        ]
        for of_rank in zip(plan, totals, used, strict=True)
    ]


def filler_of(sequence: TrainingSequence, positions: int = 1) -> TrainingSequence:
    """Positions that do not count, of tokens that the vocabulary has.

    They repeat the tokens of `sequence`: one token alone would go to the same few experts everywhere.
    """
    return TrainingSequence(
        token_ids=np.resize(sequence.token_ids, positions + 1),
        label_mask=np.zeros(positions, dtype=np.bool_),
        old_log_probs=np.zeros(positions, dtype=np.float32),
        advantage=0.0,
        key=FILLER_KEY,
        engine_log_weights=None if sequence.engine_log_weights is None else np.zeros(positions, dtype=np.float32),
        reference_log_probs=None if sequence.reference_log_probs is None else np.zeros(positions, dtype=np.float32),
    )


@dataclass(frozen=True)
class PackingReport:
    """How well a step is packed. Costs are those of `PackingRules.cost`, with padding and fillers.

    Attributes:
        micro_batches: of each rank.
        positions: that the step computes, over all ranks.
        real_positions: of the sequences alone.
        padding_positions: behind sequences, up to `segment_multiple`.
        filler_positions: of fillers. Real, padding and filler positions add up to `positions`.
        fill: real positions over what the micro-batches' budgets hold; above 1 only if sequences exceed the budget.
        rank_balance: mean over maximum of the ranks' costs; what the ranks work if they wait at the step's end alone.
        step_balance: the same if they wait for each other after every micro-batch: the mean over the sum of each
            micro-batch's maximum. At most `rank_balance`.
    """

    micro_batches: int
    positions: int
    real_positions: int
    padding_positions: int
    filler_positions: int
    fill: float
    rank_balance: float
    step_balance: float


def report_packing(step: list[list[MicroBatch]], rules: PackingRules) -> PackingReport:
    """What `pack_step` made of a step, in numbers."""
    micro_batches = [micro_batch for per_rank in step for micro_batch in per_rank]
    sequences = [
        (key, length)
        for micro_batch in micro_batches
        for key, length in zip(micro_batch.keys, micro_batch.lengths, strict=True)
    ]
    real = sum(length for key, length in sequences if key != FILLER_KEY)
    filler = sum(length for key, length in sequences if key == FILLER_KEY)
    positions = sum(len(micro_batch.input_ids) for micro_batch in micro_batches)
    cost = np.array([[_cost(micro_batch, rules) for micro_batch in per_rank] for per_rank in step])
    mean = cost.sum() / len(step)
    return PackingReport(
        micro_batches=len(step[0]),
        positions=positions,
        real_positions=real,
        padding_positions=positions - real - filler,
        filler_positions=filler,
        fill=real / (len(micro_batches) * rules.token_budget),
        rank_balance=float(mean / cost.sum(1).max()),
        step_balance=float(mean / cost.max(0).sum()),
    )


def _with_filler(
    sequences: list[TrainingSequence], pattern: TrainingSequence, lacking: int, rules: PackingRules
) -> MicroBatch:
    return pack([*sequences, filler_of(pattern, lacking)] if lacking else sequences, rules.segment_multiple)


def _cost(micro_batch: MicroBatch, rules: PackingRules) -> float:
    return sum(rules.cost(length) for length in micro_batch.cu_seqlens.diff().tolist())
