"""Accuracy, pass@k and the figures of a batch, against counts made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.evaluation import describe_evaluation
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.rollout.trajectory import Group, Segment, Trajectory, fingerprint

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.9, 0.0], [1.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 4, 6, 8], [1, 1, 1, 1], [3, 3, 3, 3]]


def groups() -> list[Group]:
    made = []
    for number, (rewards, lengths) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        prompt = Prompt(f"p/{number}", "", np.array([1, 2], dtype=np.int32), 0, None)
        made.append(Group(prompt))
        for sample, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
            ids, log_probs = np.full(length, 300, dtype=np.int32), np.zeros(length, dtype=np.float32)
            finish = "length" if length == 8 else "stop"
            outcome = "timeout" if (number, sample) == (1, 0) else "graded"
            segments = [Segment(0, length, 0, "r")]
            made[-1].trajectories.append(
                Trajectory(prompt, sample, ids, log_probs, segments, finish, reward=reward, outcome=outcome)
            )
    return made


@pytest.fixture
def sampler() -> Sampler:
    tokenizer = SimpleNamespace(ids_beyond=lambda ids: int((ids >= 300).sum()))
    grader = SimpleNamespace(replies_to=lambda prompt: False)
    return Sampler(None, grader, tokenizer, 320, None, None, None)  # type: ignore[arg-type]


def test_figures_are_those_counted_by_hand(sampler):
    figures = describe_evaluation(sampler, groups())
    assert figures["accuracy"] == pytest.approx(6 / 12)  # 0.9 is not correct
    assert figures["pass_at_k"] == pytest.approx(2 / 3)
    assert figures["reward/mean"] == pytest.approx(6.9 / 12)
    assert figures["reward/groups_without_variance"] == pytest.approx(1 / 3)
    assert figures["reward/outcome/timeout"] == 1 and figures["reward/outcome/graded"] == 11
    assert figures["response/tokens"] == 20 + 4 + 12 and figures["response/length_mean"] == pytest.approx(3.0)
    assert figures["response/length_max"] == 8 and figures["response/truncated_share"] == pytest.approx(1 / 12)
    assert figures["response/ids_beyond_tokenizer"] == 36


@pytest.mark.parametrize("part", ["token", "log_prob", "reward", "order"])
def test_the_fingerprint_sees_every_part(part):
    changed = groups()
    trajectory = changed[1].trajectories[2]
    if part == "token":
        trajectory.response_ids[0] += 1
    elif part == "log_prob":
        trajectory.behavior_log_probs[0] = np.nextafter(np.float32(0), np.float32(-1))
    elif part == "reward":
        trajectory.reward = np.nextafter(0.9, 1)
    else:
        changed.reverse()
    assert fingerprint(groups()) == fingerprint(groups()) != fingerprint(changed)
