"""Sampling goes on while the policy is started again, every trajectory is used once, and there is an end to restarts."""

import json
import signal
from collections import Counter

import pytest
from lost_ranks import Faults
from test_a_run_from_start_to_report import SHORT, rows

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.errors import RunError
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration import asynchronous
from megatron_vespo.orchestration.recovery import Recovery
from megatron_vespo.orchestration.training_run import Resume, run_training_loop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # processes are started again and again

STEPS, BOUND, KILLED, POISON = 16, 7, (0, 5), 10
SETTINGS = (
    *SHORT,
    f"algorithm.steps={STEPS}",
    f"algorithm.asynchronous={{sync_every: 2, max_staleness: {BOUND}}}",
    "routing.replay=R3",
    "rollout.concurrent_groups=4",  # most of what may be sampled ahead is not yet when the first step begins
    "policy.max_restarts=2",
    "checkpoint.save_every=4",
    "evaluation.prompts=4",
    "evaluation.every_steps=0",
    "observability.tensorboard=false",
)
KILL = (1, signal.SIGKILL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its folder; the trajectories of each step; how many had been sampled when the policy was killed first, and when it
    was back; how it ended.

    The policy is killed once in each step of KILLED, and always in step POISON.
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = load_config(TrainConfig, "examples/quickstart.yaml", [f"run_dir={folder}", *SETTINGS])
    used, sampled, left = [], [], list(KILLED)
    train_step, recover = asynchronous.train_step, Recovery.recover

    def fault(what, policy):
        step = used[-1][0] if used else -1
        if what != "train a step" or (step != POISON and step not in left):
            return None
        if step != POISON:
            left.remove(step)
        return KILL

    async def remembered(session, trajectories):
        used.append((session.progress.step, trajectories))
        sampled.append(session.tally.trajectories_generated)
        await train_step(session, trajectories)

    async def measured(self, lost):
        await recover(self, lost)
        sampled.append(self._session.tally.trajectories_generated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asynchronous, "train_step", remembered)
        patch.setattr(Recovery, "recover", measured)
        Faults({}, fault).install(patch)
        with RunConsole("test", STEPS, 2, "plain") as console, pytest.raises(RunError) as caught:
            run_training_loop(config, console, asynchronous.train, Resume())
    return folder, used, sampled, str(caught.value)


def test_every_step_is_told_once_and_every_trajectory_used_once(run):
    folder, used, _, _ = run
    assert [row["step"] for row in rows(folder, "step")] == list(range(1, POISON + 1))
    assert [step for step, _ in used] == list(range(POISON + 1))
    names = Counter((t.prompt.identity, t.sample) for _, step in used for t in step)
    assert set(names.values()) == {1} and len(names) == (POISON + 1) * 16
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == POISON and summary["trajectories_used"] == POISON * 16
    assert summary["weight_sync_mismatches"] == 0 and summary["max_staleness_seen"] <= BOUND


def test_sampling_goes_on_meanwhile(run):
    before, after = run[2][:2]
    assert after > before >= 16


def test_a_policy_that_dies_again_and_again_ends_the_run_with_the_first_cause(run):
    folder, _, _, failure = run
    cause = "policy rank 1: its process died (killed, out of memory, or crashed)"
    assert failure == f"{cause}; started again 2 times since the last checkpoint (policy.max_restarts)"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == f"failed: {failure}"
    assert summary["policy_restarts"] == len(rows(folder, "restart")) == len(KILLED)
    assert not (folder / "journal").exists()
