"""With `sbatch --no-kill` a lost node costs no attempt: what was on it goes to the nodes that are left, and what is computed
is what an undisturbed run computes."""

from pathlib import Path

import pytest
from cluster_jobs import slurm_sandbox, until
from training_jobs import TrainingJob, figures

from megatron_vespo.observability.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]

OPTIONS = ("--no-kill", "--nodes=3")
TWO_ENGINES = ("cluster.policy_nodes=1", "cluster.engine_nodes=2", "rollout.engine.count=2")
TWO_TRAINERS = ("cluster.policy_nodes=2", "cluster.engine_nodes=1")


@pytest.fixture
def nodes(three):
    """Three, with nothing on them."""
    three.mend()
    yield three
    three.mend()


def lose(nodes, tmp_path, split: tuple[str, ...], lost: str) -> tuple[TrainingJob, str]:
    """A job that lost a node on the way and came to its end in the same attempt; and what its driver said."""
    job = TrainingJob(nodes, tmp_path, *split, options=OPTIONS)
    job.until_saved(2)
    until(lambda: ("node3", "alive") in engines_of(job.run), "the status of the run has the engines of other nodes")
    slurm_sandbox.kill_node(nodes.sandbox, lost)
    assert job.finish()["Restarts"] == "0"
    return job, (job.run / "slurm" / "attempt_0" / "node1.driver.log").read_text()


def engines_of(run: Path) -> list[tuple[str, str]]:
    """Node and state of the engines' processes, as `megatron-vespo status` tells."""
    return [(part.host, part.state) for part in read_status(run).parts if part.name.startswith("engine")]


def test_an_engine_goes_to_another_node(nodes, tmp_path, alone):
    job, told = lose(nodes, tmp_path, TWO_ENGINES, "node3")
    assert "node3 is lost" in told and "engine 1 is taken out, and started again on node2" in told
    assert figures(job.run) == alone


def test_the_trainer_starts_again_on_what_is_left(nodes, tmp_path, alone):
    job, told = lose(nodes, tmp_path, TWO_TRAINERS, "node2")
    assert "node2 is lost" in told and "the policy is where it was" in told
    assert figures(job.run) == alone


def test_without_its_first_node_the_job_is_queued_again_by_another_one(nodes, tmp_path):
    job = TrainingJob(nodes, tmp_path, *TWO_ENGINES, options=OPTIONS)
    job.until_saved(2)
    slurm_sandbox.kill_node(nodes.sandbox, "node1")
    until(lambda: job.facts()["Restarts"] == "1", "the job is queued again")
    slurm_sandbox.boot_node(nodes.sandbox, "node1")
    job.start_now()
    job.finish()
