"""Whatever a scorer does, its trajectory gets an outcome, others their rewards, and no process stays."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from graders import Stubborn, Unpicklable

from megatron_vespo.config import ConfigError, DataConfig, FileSource, ReasoningGymSource, RewardConfig
from megatron_vespo.rewards.pool import OUTCOMES, RewardPool


def grade(pool, trajectories):
    asyncio.run(pool.grade(trajectories))
    return [(t.outcome, t.reward) for t in trajectories]


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("throw it", "exception"),
        ("eat", "exception"),  # MemoryError, at the limit that the process was given
        ("return_text abc", "exception"),
        ("hang", "timeout"),
        ("hang_deaf", "timeout"),
        ("die", "crash"),
        ("exit", "crash"),
        ("return nan", "not_finite"),
        ("return inf", "not_finite"),
    ],
)
def test_each_failure_has_a_name_and_the_rest_of_its_group_is_graded(pool, trajectory, text, outcome):
    group = [trajectory(t, sample=i) for i, t in enumerate(["yes", text, "no", "yes"])]
    assert outcome in OUTCOMES
    assert grade(pool, group) == [("graded", 1.0), (outcome, -0.5), ("graded", 0.0), ("graded", 1.0)]


def test_many_failures_in_one_group(pool, trajectory):
    group = [trajectory(t) for t in ("hang", "die", "hang", "throw", "yes", "return nan", "die", "return 0.25")]
    grade(pool, group)
    assert Counter(t.outcome for t in group) == {"timeout": 2, "crash": 2, "exception": 1, "not_finite": 1, "graded": 2}
    assert [t.reward for t in group if t.outcome == "graded"] == [1.0, 0.25]


def test_references_that_cannot_be_sent_are_exceptions_of_theirs_alone(pool, trajectory):
    group = [trajectory("yes", {"answer": Unpicklable()}), trajectory("yes", {"answer": Stubborn()}), trajectory("yes")]
    assert [outcome for outcome, _ in grade(pool, group)] == ["exception", "exception", "graded"]


def test_what_graders_print_is_seen_and_disturbs_neither_the_connection_nor_standard_output(
    misbehaving, trajectory, capfd
):
    with RewardPool(RewardConfig(), misbehaving) as pool:
        results = grade(pool, [trajectory('print {"reward": 7.0}'), trajectory("yes")])
    assert results == [("graded", 0.0), ("graded", 1.0)]
    written = capfd.readouterr()
    assert '{"reward": 7.0}' in written.err and written.out == ""


def test_a_kill_takes_what_the_grader_started_with_it(pool, trajectory, tmp_path):
    grade(pool, [trajectory(f"hang_with_child {tmp_path / 'pid'}")])
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_idle_worker_that_dies_costs_no_reward(pool, trajectory):
    grade(pool, [trajectory("yes")])
    for pid in pool.pids:
        os.kill(pid, 9)
        assert gone(pid)
    assert grade(pool, [trajectory("yes")]) == [("graded", 1.0)]


def test_the_first_of_each_kind_is_told_with_its_traceback_the_others_are_not(misbehaving, trajectory, caplog):
    with RewardPool(RewardConfig(), misbehaving) as pool:
        grade(pool, [trajectory("throw one"), trajectory("throw two"), trajectory("return nan")])
    assert len(caplog.records) == 2
    assert "ZeroDivisionError: one" in caplog.text and "in misbehave" in caplog.text
    assert "'not_finite'" in caplog.text


def test_the_deadline_is_kept_and_a_new_process_warms_up_before_its_own_begins(trajectory, monkeypatch, tmp_path):
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(1)\nfrom graders import misbehave\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = DataConfig(sources=(FileSource(type="file", path="unused", scorer="slow_to_import:misbehave"),))
    with RewardPool(RewardConfig(timeout_seconds=0.5), data) as pool:
        started = time.monotonic()
        results = grade(pool, [trajectory("yes"), trajectory("hang"), trajectory("yes")])
        seconds = time.monotonic() - started
    assert [outcome for outcome, _ in results] == ["graded", "timeout", "graded"]
    assert 1.5 < seconds < 5


def test_workers_grade_side_by_side(misbehaving, trajectory):
    with RewardPool(RewardConfig(workers=2, timeout_seconds=1.0), misbehaving) as pool:
        assert len(pool.pids) == 2
        group = [trajectory("hang"), *(trajectory("yes") for _ in range(20))]

        async def first_results():
            everything = [asyncio.create_task(pool.grade([t])) for t in group]
            await asyncio.gather(*everything[1:])
            return everything[0].done(), await everything[0]

        hung_was_done, _ = asyncio.run(first_results())
    assert not hung_was_done
    assert Counter(t.outcome for t in group) == {"timeout": 1, "graded": 20}


def test_closing_ends_every_process_even_amid_a_hang(misbehaving, trajectory):
    threads = set(threading.enumerate())
    pool = RewardPool(RewardConfig(workers=2, timeout_seconds=600), misbehaving)
    pool.start()
    pids = pool.pids
    group = [trajectory("hang"), trajectory("hang")]

    async def close_amid() -> float:
        asyncio.get_running_loop().call_later(0.3, closer.start)
        with pytest.raises(RuntimeError, match="closed"):
            await pool.grade([*group])
        return time.monotonic()

    closer = threading.Thread(target=pool.close)
    started = time.monotonic()
    assert asyncio.run(close_amid()) - started < 3
    closer.join()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)
    assert set(threading.enumerate()) <= threads
    assert [t.outcome for t in group] == [""] * 2
    with pytest.raises(RuntimeError, match="not running"):
        asyncio.run(pool.grade([trajectory("yes")]))


DRIVER = """
import asyncio, time
import numpy as np
from megatron_vespo.config import DataConfig, FileSource, RewardConfig
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rollout.trajectory import Trajectory

source = FileSource(type="file", path="unused", scorer="graders:misbehave")
pool = RewardPool(RewardConfig(workers=2, timeout_seconds=600), DataConfig(sources=(source,)))
pool.start()
prompt = Prompt("p", "q", np.zeros(1, np.int32), 0, {"answer": "yes"})
empty = np.zeros(0, np.float32)
hanging = Trajectory(prompt, 0, np.zeros(0, np.int32), empty, [], "stop", text="hang")

async def main():
    task = asyncio.create_task(pool.grade([hanging]))
    await asyncio.sleep(0.5)
    print(*pool.pids, flush=True)
    await task

asyncio.run(main())
"""


def test_processes_die_with_a_driver_that_is_killed_even_amid_a_hang():
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_scorer_that_is_missing_where_it_runs_fails_the_start_and_leaves_nothing():
    data = DataConfig(sources=(FileSource(type="file", path="unused", scorer="no_such_module:f"),))
    pool = RewardPool(RewardConfig(), data)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.scorer: module 'no_such_module'"):
        pool.start()
    assert pool.pids == []


def test_too_little_memory_to_start_says_so():
    data = DataConfig(sources=(ReasoningGymSource(type="reasoning_gym", task="chain_sum"),))
    with pytest.raises(RuntimeError, match=r"memory_limit_mb \(50\) may be too small"):
        RewardPool(RewardConfig(memory_limit_mb=50), data).start()
