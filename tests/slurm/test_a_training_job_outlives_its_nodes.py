"""A two-node job trains to its end, whichever node is lost on the way, and computes what an uninterrupted run does."""

import pytest
from cluster_jobs import slurm_sandbox, until
from training_jobs import ENGINE, STEPS, TRAINER, TrainingJob, figures

pytestmark = pytest.mark.timeout(6000)


def survive(whole, tmp_path, lost: str) -> TrainingJob:
    job = TrainingJob(whole, tmp_path)
    job.until_saved(2)
    slurm_sandbox.kill_node(whole.sandbox, lost)
    job.until_queued_again()
    slurm_sandbox.boot_node(whole.sandbox, lost)
    job.start_now()
    job.finish()
    return job


def test_a_job_whose_engine_node_is_lost_is_queued_again_and_finishes(whole, tmp_path):
    job = survive(whole, tmp_path, ENGINE)
    steps = [row["step"] for row in figures(job.run) if row["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    for attempt in ("attempt_0", "attempt_1"):
        names = {log.name for log in (job.run / "slurm" / attempt).iterdir()}
        assert names >= {f"{TRAINER}.driver.log", f"{TRAINER}.ray.log", f"{ENGINE}.ray.log"}
    until(job.is_gone, "nothing is left on the nodes")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [TRAINER, ENGINE])
def test_what_is_computed_is_that_of_a_run_without_interruption_on_one_host(whole, tmp_path, alone, lost):
    job = survive(whole, tmp_path, lost)
    assert figures(job.run) == alone
