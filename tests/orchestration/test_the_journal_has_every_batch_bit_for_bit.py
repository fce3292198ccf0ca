"""What a step was taken on can be had back until a checkpoint makes it needless; a full disk is said."""

import asyncio

import numpy as np
import pytest

from megatron_vespo.data.prompt import Prompt
from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.journal import StepJournal
from megatron_vespo.rollout.trajectory import Segment, Trajectory
from megatron_vespo.routing.routes import Routes


def batch(seed: int) -> list[Trajectory]:
    generator, trajectories = np.random.default_rng(seed), []
    for sample in range(3):
        tokens, prompt_tokens = int(generator.integers(1, 20)), 4
        positions = tokens + prompt_tokens - 1
        trajectories.append(
            Trajectory(
                Prompt(f"task/{seed}", "what?", np.arange(prompt_tokens, dtype=np.int32), 0, None),
                sample,
                generator.integers(0, 300, tokens).astype(np.int32),
                generator.normal(size=tokens).astype(np.float32),
                [Segment(0, tokens, seed, f"r{sample}")],
                "stop",
                advantage=float(generator.normal()),
                reward=1 / 3,
                proximal_log_probs=generator.normal(size=tokens).astype(np.float32),
                engine_routes=Routes(
                    generator.integers(0, 8, (positions, 2, 2)).astype(np.uint8),
                    generator.random(positions) > 0.1,
                    np.full(positions, seed, dtype=np.int64),
                ),
            )
        )
    return trajectories


def same(one: list[Trajectory], other: list[Trajectory]) -> bool:
    def parts(t: Trajectory) -> tuple:
        arrays = (t.prompt.token_ids, t.response_ids, t.behavior_log_probs, t.proximal_log_probs)
        routes = t.engine_routes
        arrays += (routes.experts, routes.recorded, routes.weight_versions)
        return (t.sample, t.advantage, t.reward, t.segments, [(a.dtype, a.shape, a.tobytes()) for a in arrays])

    return list(map(parts, one)) == list(map(parts, other))


def test_batches_come_back_until_a_later_checkpoint_and_are_gone_after_the_run(tmp_path):
    async def scenario() -> None:
        async with StepJournal(tmp_path / "journal") as journal:
            for step in range(4):
                await journal.add(step, batch(step))
            journal.drop_before(2)
            for step in (3, 2):
                assert same(await journal.read(step), batch(step)) and not same(await journal.read(step), batch(9))
            with pytest.raises(FileNotFoundError):
                await journal.read(1)

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_what_a_driver_that_died_left_is_not_taken_for_this_runs(tmp_path):
    (tmp_path / "journal" / "0").mkdir(parents=True)

    async def scenario() -> None:
        async with StepJournal(tmp_path / "journal") as journal:
            await journal.add(0, batch(0))
            assert same(await journal.read(0), batch(0))

    asyncio.run(scenario())


def test_a_batch_that_could_not_be_written_is_said_before_the_next_step(tmp_path):
    async def scenario() -> None:
        async with StepJournal(tmp_path / "journal") as journal:
            (tmp_path / "journal" / "0").touch()
            await journal.add(0, batch(0))
            with pytest.raises(RunError, match=r"journal: the batch of a step could not be written.*Make room"):
                await journal.add(1, batch(1))

    asyncio.run(scenario())
