"""Where a finished run's wall time went, and how fast it sampled and trained.

python benchmarks/quickstart_phases.py runs/quickstart
"""

import argparse

from megatron_vespo.config import ConfigError
from megatron_vespo.observability.run_folder import RunFolder, read_run


def total(run: RunFolder, kind: str, name: str) -> float:
    return sum(row.get(name) or 0.0 for row in run.kind(kind))


def phases(run: RunFolder) -> list[tuple[str, float]]:
    """(name, seconds). Indented names are parts of the one above; those of the start-up run side by side."""
    starts = run.kind("phase")
    start_up = max(row["timestamp"] for row in starts) - min(row["timestamp"] - row["time/seconds"] for row in starts)
    parts = sorted({name for row in run.kind("sync") for name in row if name.startswith("time/")} - {"time/sync"})
    found = [
        ("start-up", start_up),
        *((f"  {row['phase']}", row["time/seconds"]) for row in starts),
        ("generate", total(run, "rollout", "time/generate")),
        ("reward wait", total(run, "rollout", "time/reward_wait")),
        ("train", total(run, "step", "time/train")),
        ("sync", total(run, "sync", "time/sync")),
        *((f"  {name.removeprefix('time/')}", total(run, "sync", name)) for name in parts),
        ("evaluate", total(run, "evaluation", "time/evaluate")),
    ]
    known = sum(seconds for name, seconds in found if not name.startswith(" "))
    return [*found, ("rest (checks, Ray, export, stop)", run.summary["wall_seconds"] - known)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    try:
        run = read_run(parser.parse_args().run_dir)
    except ConfigError as error:
        parser.error(str(error))
    if run.summary.get("status") != "finished":
        parser.error(f"{run.path}: not a finished run (summary.json)")
    wall = run.summary["wall_seconds"]
    for name, seconds in [*phases(run), ("wall", wall)]:
        print(f"{name:34} {seconds:8.1f} s {seconds / wall:7.1%}")
    sampled = total(run, "rollout", "response/tokens")
    trained = total(run, "step", "tokens/trained")
    print(f"sampled {sampled / total(run, 'rollout', 'time/generate'):,.0f} tokens/s while generating")
    print(f"trained {trained / total(run, 'step', 'time/train'):,.0f} tokens/s while training")
    print(f"sampled {sampled / wall:,.0f} tokens/s over the wall time")


if __name__ == "__main__":
    main()
