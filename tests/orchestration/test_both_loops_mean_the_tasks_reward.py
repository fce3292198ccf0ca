"""What is told of rewards, and which groups are left out, goes by the task's reward, however training shapes it.

Two responses to each prompt, of 1 and of 3 tokens, with rewards 0 and 1, or 0 and 0 to each third prompt; the longer
one then loses a half.
"""

import asyncio

import pytest
from small_session import Engine, session_of

from megatron_vespo.orchestration.generator import Generator
from megatron_vespo.orchestration.mini_batches import mini_batches
from megatron_vespo.orchestration.rollouts import collect_rollouts, prepare_groups

SHAPED = {
    "advantage": {"estimator": "group_mean", "zero_variance_groups": "filter"},
    "overlong_shaping": {"buffer_tokens": 2, "penalty": 1.0},
}


def advantages_of(trajectories) -> dict[str, list[float]]:
    """By prompt."""
    return {
        name: [t.advantage for t in trajectories if t.prompt.identity == name]
        for name in dict.fromkeys(t.prompt.identity for t in trajectories)
    }


def test_in_the_synchronous_loop():
    async def main():
        session = session_of(Engine(), prompts_per_step=3, staleness=2, **SHAPED)
        groups = await collect_rollouts(session, batch=0, weight_version=0)
        return session.rows, [advantages_of(batch) for batch in mini_batches(groups, 3)]

    (row,), batches = asyncio.run(main())
    assert row["reward/mean"] == pytest.approx(4 / 12)
    assert row["reward/std"] == pytest.approx((4 / 12 * 8 / 12) ** 0.5)
    assert row["reward/groups_without_variance"] == pytest.approx(2 / 6) and row["advantage/groups_left_out"] == 2
    # Rewards 0 and 1 - 0.5, less their mean.
    assert batches == [{"1": [-0.25, 0.25], "2": [-0.25, 0.25]}, {"4": [-0.25, 0.25], "5": [-0.25, 0.25]}]


def test_in_the_asynchronous_loop():
    async def main():
        session = session_of(Engine(), asynchronous={"sync_every": 2, "max_staleness": 5}, **SHAPED)
        generator = Generator(session)
        groups = await generator.next_step()
        trajectories = await prepare_groups(session, generator, groups, waited_seconds=0.0)
        await generator.stop()
        return session.rows, advantages_of(trajectories)

    (row,), advantages = asyncio.run(main())
    assert row["reward/mean"] == row["reward/std"] == pytest.approx(0.5)
    assert row["reward/groups_without_variance"] == 0
    assert advantages == {"1": [-0.25, 0.25], "2": [-0.25, 0.25]}


def test_both_have_the_same_fingerprint_of_the_same_groups():
    """Without anything left out, the first step of both is on prompts 0 and 1."""
    shaping = {"overlong_shaping": SHAPED["overlong_shaping"]}

    async def synchronous():
        session = session_of(Engine(), prompts_per_step=2, staleness=1, **shaping)
        await collect_rollouts(session, batch=0, weight_version=0)
        return session.rows

    async def asynchronous():
        session = session_of(Engine(), asynchronous={"sync_every": 2, "max_staleness": 5}, **shaping)
        generator = Generator(session)
        await prepare_groups(session, generator, await generator.next_step(), waited_seconds=0.0)
        await generator.stop()
        return session.rows

    ((one,), (other,)) = asyncio.run(synchronous()), asyncio.run(asynchronous())
    assert one["response/fingerprint"] == other["response/fingerprint"]
