"""The end of its time, scancel, a mistake and a neighbour: what a two-node job does, and what is left of it."""

import pytest
from cluster_jobs import until
from training_jobs import ENGINE, SPLIT, STEPS, TrainingJob, figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]


def test_before_its_time_is_up_a_job_saves_and_goes_on_later(whole, tmp_path):
    job = TrainingJob(whole, tmp_path, *SPLIT, "checkpoint.save_every=1000")
    log = job.run / "slurm" / "attempt_0" / "node1.driver.log"
    until(lambda: log.exists() and "step 1/" in log.read_text(), "a step is done")
    assert whole.command("scancel", "--batch", "--signal=USR1", job.number).returncode == 0
    job.until_queued_again()
    assert "after a checkpoint of step" in log.read_text()
    job.start_now()
    job.finish()
    assert "resumed after step" in (job.run / "slurm" / "attempt_1" / "node1.driver.log").read_text()
    assert [row["step"] for row in figures(job.run) if row["kind"] == "step"] == list(range(1, STEPS + 1))


def test_a_cancelled_job_leaves_nothing(whole, tmp_path):
    job = TrainingJob(whole, tmp_path)
    until(lambda: any("sglang" in words for words in whole.processes(ENGINE)), "an engine starts on its node")
    assert whole.command("scancel", job.number).returncode == 0
    assert whole.wait(job.number)["JobState"] == "CANCELLED"
    until(job.is_gone, "nothing is left on the nodes")


def test_a_mistake_ends_the_job_with_its_message(whole, tmp_path):
    job = TrainingJob(whole, tmp_path, "algorithm.stepz=3")
    facts = whole.wait(job.number)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    assert "algorithm.stepz: unknown key" in job.told()
    hours, minutes, seconds = map(int, facts["RunTime"].split(":"))
    assert 3600 * hours + 60 * minutes + seconds <= 20


def test_ray_that_ends_on_a_node_fails_the_job(whole, tmp_path):
    job = TrainingJob(whole, tmp_path)
    job.until_saved(1)
    machine = whole.sandbox.process(ENGINE)
    next(process for process in machine.children(recursive=True) if process.name() == "raylet").kill()
    facts = whole.wait(job.number)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), job.told()
    assert f"Ray on {ENGINE} ended before the run" in job.told()
    until(job.is_gone, "nothing is left on the nodes")


def test_two_jobs_share_a_node(whole, tmp_path):
    half = ("--nodes=1", "--nodelist=node1", "--gpus-per-node=4", "--cpus-per-task=4")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    jobs = [TrainingJob(whole, folder, "seed=3", options=half) for folder in folders]
    one, two = (job.finish() for job in jobs)
    assert max(one["StartTime"], two["StartTime"]) < min(one["EndTime"], two["EndTime"])
    assert figures(jobs[0].run) == figures(jobs[1].run)
