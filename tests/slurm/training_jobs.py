"""Runs of slurm/train.sbatch on two nodes: the trainer on one, the engine on the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cluster_jobs import DEADLINE_SECONDS, ROOT, Cluster, until

STEPS = 8
SMALL = (
    *("examples/quickstart.yaml", f"algorithm.steps={STEPS}", "algorithm.staleness=2", "evaluation.prompts=4"),
    *(
        "evaluation.exclude=[]",
        "evaluation.every_steps=0",
        "checkpoint.save_every=1",
        "observability.tensorboard=false",
    ),
)
SPLIT = ("cluster.policy_nodes=1", "cluster.engine_nodes=1")
TRAINER, ENGINE = "node1", "node2"
FIGURES = (
    "step",
    "loss",
    "grad_norm",
    "tokens/trained",
    "log_weight/p50",
    "response/fingerprint",
    "accuracy",
    "reward/mean",
)
"""Of a row of metrics; the same bit for bit in every run of these settings, whatever interrupts it."""


class TrainingJob:
    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *words: str,
        options: tuple[str, ...] = (),
        config: tuple[str, ...] = SMALL,
    ) -> None:
        """`words`: further settings; none: SPLIT. `options`: of sbatch."""
        self.cluster, self.run, self.output = cluster, folder / "run", folder / "output"
        own = (f"--output={self.output}", *options, "slurm/train.sbatch", *config, f"run_dir={self.run}")
        self.number = cluster.submit(*own, *(words or SPLIT))

    def facts(self) -> dict[str, str]:
        return self.cluster.facts(self.number)

    def until_saved(self, step: int) -> None:
        """Until a checkpoint of `step`, or of a later one, is complete."""

        def saved() -> bool:
            assert self.facts()["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), self.told()
            found = [int(folder.name[5:]) for folder in self.run.glob("checkpoints/step_*[0-9]")]
            return max(found, default=0) >= step

        until(saved, f"a checkpoint of step {step}; {self.told()}")

    def until_queued_again(self) -> None:
        until(lambda: self.facts()["Restarts"] == "1", "the job is queued again")

    def start_now(self) -> None:
        """Slurm itself lets two minutes pass before it starts a job again."""

        def pending() -> bool:
            return self.facts()["JobState"] != "COMPLETING" and self.facts()["JobState"] != "RUNNING"

        until(pending, "the job has ended on its nodes")
        self.cluster.command("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def finish(self, seconds: float = DEADLINE_SECONDS) -> dict[str, str]:
        facts = self.cluster.wait(self.number, seconds)
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), self.told()
        return facts

    def told(self) -> str:
        return self.output.read_text() if self.output.exists() else "(no output)"

    def is_gone(self) -> bool:
        """Whether nothing of it is left on the nodes."""
        names = self.cluster.nodes
        return not any(self.cluster.processes(node) or self.cluster.local_files(node) for node in names)


def figures(run: Path) -> list[dict]:
    """What was computed, row by row, without what was measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    computed = [row for row in rows if row["kind"] in ("step", "rollout", "evaluation")]
    return [{key: row[key] for key in ("kind", *FIGURES) if key in row} for row in computed]


def without_a_cluster(folder: Path) -> list[dict]:
    """The figures of the same run on this host alone, without Slurm."""
    words = [sys.executable, "-m", "megatron_vespo", "train", *SMALL, f"run_dir={folder / 'alone'}"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return figures(folder / "alone")
