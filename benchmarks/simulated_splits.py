"""Simulated throughput over the staleness bound and the split of GPUs, from 8 to 1,024 GPUs, with published speeds.

python benchmarks/simulated_splits.py --out results/simulated_splits.json --figure docs/images/splits.png

The same batch on more and more GPUs: 32 prompts with 16 responses a step, weights every 4 steps, prompts of 512 tokens,
responses lognormal with median 4,000 and sigma 0.8, cut at 16,384.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.planning.published import QWEN3_30B_A3B_ON_H100
from megatron_vespo.planning.split import Lengths, Row, plan_split, recommended

GPUS = (8, 32, 128, 1024)
BOUNDS = (None, 3, 7, 15)
LENGTHS = Lengths(prompt=512, median=4000, sigma=0.8, longest=16_384)
SETTINGS = (
    "algorithm.asynchronous={sync_every: 4, max_staleness: 7}",
    "algorithm.prompts_per_step=32",
    "rollout.group_size=16",
    "rollout.concurrent_groups=4096",
    "policy.ranks=4",
    "policy.layout={tp: 2, ep: 2}",
    "checkpoint.save_every=0",
)


def name_of(bound: int | None) -> str:
    return "synchronous" if bound is None else f"S = {bound}"


def draw(rows: dict[int, list[Row]], path: Path) -> None:
    figure, grid = plt.subplots(1, len(rows), figsize=(3.4 * len(rows), 3.4), layout="constrained", squeeze=False)
    axes = grid[0]
    for axis, gpus in zip(axes, rows, strict=True):
        for bound in BOUNDS:
            of_bound = [row for row in rows[gpus] if row.max_staleness == bound]
            share = [row.rollout_gpus / gpus for row in of_bound]
            axis.plot(share, [row.tokens_per_second / gpus for row in of_bound], "o-", ms=3, label=name_of(bound))
        axis.set_title(f"{gpus:,} GPUs")
        axis.set_xlabel("share of the GPUs that sample")
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("response tokens a second and GPU")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def line(gpus: int, row: Row) -> str:
    outcome = row.outcome
    return (
        f"| {gpus:,} | {name_of(row.max_staleness)} | {row.rollout_gpus} + {row.train_gpus} | {row.step_seconds:.1f} | "
        f"{row.trajectories_per_second:.2f} | {row.tokens_per_second:,.0f} | {outcome.generation_speed:.0%} | "
        f"{outcome.training:.0%} | {row.mean_staleness:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every split here, as JSON")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    options = parser.parse_args()
    config = load_config(TrainConfig, "examples/quickstart.yaml", list(SETTINGS))
    rows = {gpus: plan_split(config, gpus, QWEN3_30B_A3B_ON_H100, LENGTHS, BOUNDS) for gpus in options.gpus}
    for gpus, of_gpus in rows.items():
        for bound in BOUNDS:
            print(line(gpus, recommended([row for row in of_gpus if row.max_staleness == bound])), flush=True)
    if options.figure:
        draw(rows, options.figure)
    if options.out:
        figures = {str(gpus): [row.figures() for row in of_gpus] for gpus, of_gpus in rows.items()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=None) + "\n")


if __name__ == "__main__":
    main()
