"""What R3 costs in a run: step time and the engine's speed, with and without, on the quickstart's task.

    python benchmarks/routing_replay_cost.py --json results/routing_replay_cost.json

Runs without and with R3 take turns, each with a real engine and two trainer ranks. Compared is the time of an optimizer
step for each trained position (which holds slicing the routes and sending them), and the tokens that the engine samples
a second. The first step and the first batch of each run are left out: they warm up. The machine may be shared: compare
ratios.
"""

import argparse
import json
import os
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vespo.config import AblationConfig, plan_runs
from megatron_vespo.observability.run_folder import RunFolder, read_run
from megatron_vespo.orchestration.ablation import run_ablation

CONFIG = Path("examples/quickstart.yaml")
STEPS = 32
RUNS = 4
"""Pairs, each with a seed of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help="pairs of runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    grid = AblationConfig(
        title="What R3 costs",
        config=CONFIG.name,
        set={"algorithm.steps": STEPS, "evaluation.prompts": 8, "evaluation.every_steps": 0},
        variants={"off": {}, "R3": {"set": {"routing.replay": "R3"}}},  # type: ignore[arg-type]
        seeds=tuple(range(1, arguments.runs + 1)),
    )
    with tempfile.TemporaryDirectory() as out:
        planned = plan_runs(grid, CONFIG, Path(out))
        run_ablation(grid.title, planned, Path(out))
        pairs = [
            {run.variant: speeds(read_run(run.config.run_dir)) for run in planned if run.seed == seed}
            for seed in grid.seeds
        ]
    step = [pair["R3"]["step"] / pair["off"]["step"] for pair in pairs]
    engine = [pair["R3"]["engine"] / pair["off"]["engine"] for pair in pairs]
    figures = {"step_time_ratio": spread(step), "engine_speed_ratio": spread(engine), "pairs": pairs}
    for name, what in (("step_time_ratio", "step time, R3 / off"), ("engine_speed_ratio", "engine tokens/s, R3 / off")):
        found = figures[name]
        print(f"{what:28} {found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f}) over {len(pairs)} pairs")
    if arguments.json:
        head = {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "steps": STEPS}
        arguments.json.write_text(json.dumps(head | figures, indent=1) + "\n")


def speeds(run: RunFolder) -> dict[str, float]:
    """Median over steps of the seconds of a trained position, and over batches of sampled tokens a second."""
    steps = run.rows["step"][1:]
    batches = run.rows["rollout"][1:]
    return {
        "step": statistics.median(row["time/train"] / row["tokens/trained"] for row in steps),
        "engine": statistics.median(row["speed/generated_tokens_per_second"] for row in batches),
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
