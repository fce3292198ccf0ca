"""Responses of several turns: what an environment says is context, the engine's own tokens stay as they were sampled."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from broadcast import group_with, send
from held_weights import weights_in
from rollouts import collect, random_prompts, sampled, settings_of
from test_engine_equals_transformers import naive_log_probs
from tiny_engine import ROUTE_SHAPE, write_tiny_qwen3_moe
from transformers_routes import load, routes_of, tokens_of

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.generate import generate_groups

pytestmark = pytest.mark.engine

STOPS = list(range(2, 60))
"""A fifth of the vocabulary, so that turns end soon."""
ROLLOUT = RolloutConfig(group_size=3, max_response_tokens=80, deterministic=True)
TURNS = 4


@pytest.fixture(scope="module")
def reference(tiny_qwen3_moe):
    return load(tiny_qwen3_moe)


class Environment:
    """Answers the n-th turn with n tokens 290 + n, after TURNS - 1 answers no more. It keeps what it was shown."""

    def __init__(self, turns: int = TURNS):
        self.turns = turns
        self.shown = []

    async def __call__(self, response):
        self.shown.append(response.token_ids.tolist())
        if response.turns >= self.turns:
            return None
        return np.full(response.turns, 290 + response.turns, dtype=np.int32)


def converse(engine, environment, **changes):
    settings = {"stop_token_ids": STOPS, "routes": ROUTE_SHAPE} | changes
    return collect(engine, random_prompts(4, low=60), ROLLOUT, environment=environment, **settings)


def turns_of(t) -> list[tuple[bool, list[int]]]:
    """Stretches of the response: whether they were sampled, and their tokens."""
    ends = [0, *(np.flatnonzero(np.diff(t.sampled.astype(int))) + 1).tolist(), len(t.sampled)]
    return [(bool(t.sampled[a]), t.response_ids[a:b].tolist()) for a, b in pairwise(ends)]


def test_the_environments_tokens_stand_between_turns_and_are_not_sampled(engine):
    environment = Environment()
    groups = converse(engine, environment)
    complete = 0
    for t in (t for group in groups.values() for t in group.trajectories):
        stretches = turns_of(t)
        assert [own for own, _ in stretches] == [n % 2 == 0 for n in range(len(stretches))]
        for number, (own, tokens) in enumerate(stretches):
            if not own:
                assert tokens == [291 + number // 2] * (1 + number // 2)
            elif number < len(stretches) - 1 or t.finish_reason == "stop":
                assert tokens[-1] in STOPS and not set(tokens[:-1]) & set(STOPS)
        complete += len(stretches) == 2 * TURNS - 1 and t.finish_reason == "stop"
        assert len(t.response_ids) <= ROLLOUT.max_response_tokens
        assert [s.start for s in t.segments] == [0, *(s.end for s in t.segments[:-1])]
        assert t.segments[-1].end == len(t.response_ids)
    assert complete >= 6  # else nothing above was looked at
    assert all(shown[-1] in STOPS for shown in environment.shown)


def test_log_probs_and_routes_are_those_of_the_whole_conversation(engine, reference):
    for t in (t for group in converse(engine, Environment()).values() for t in group.trajectories):
        expected = np.where(t.sampled, naive_log_probs(reference, t, 1.0), 0.0)
        np.testing.assert_allclose(t.behavior_log_probs, expected, atol=2e-5)
        assert t.engine_routes.recorded.all()
        np.testing.assert_array_equal(t.engine_routes.experts, routes_of(reference, tokens_of(t)))


def test_an_environment_that_says_nothing_changes_nothing(engine):
    silent = converse(engine, Environment(turns=1))
    assert sampled(silent) == sampled(converse(engine, None))
    assert all(t.sampled.all() for group in silent.values() for t in group.trajectories)


def test_conversations_repeat_themselves(engine):
    assert sampled(converse(engine, Environment())) == sampled(converse(engine, Environment()))


def test_what_leaves_no_room_for_an_answer_cuts_the_response(engine):
    async def long_winded(response):
        return np.full(ROLLOUT.max_response_tokens, 200, dtype=np.int32)

    for t in (t for group in converse(engine, long_winded).values() for t in group.trajectories):
        assert t.finish_reason == "length" and t.sampled.all()


def test_weights_may_change_between_turns(engine, reference, tiny_qwen3_moe, tmp_path):
    """The turn before the update belongs to the old weights, the answer and the turn after it to the new ones."""
    write_tiny_qwen3_moe(tmp_path / "model", seed=1)
    new = load(tmp_path / "model")
    updated = asyncio.Event()
    with group_with(engine) as group:

        async def environment(response):
            if response.turns > 1:
                return None
            await updated.wait()
            return np.full(3, 291, dtype=np.int32)

        async def both():
            settings = settings_of(engine) | {"stop_token_ids": STOPS, "weight_version": None, "routes": ROUTE_SHAPE}
            prompts = random_prompts(1, low=60)
            stream = generate_groups(engine.fleet, prompts, ROLLOUT, environment=environment, **settings)

            async def converse() -> list:
                return [t async for group in stream for t in group.trajectories]

            async def update() -> None:
                await asyncio.sleep(1)
                await engine.client.pause_generation("abort")
                await send(engine, group, weights_in(tmp_path / "model"), 1)
                await engine.client.continue_generation()
                updated.set()

            return (await asyncio.gather(converse(), update()))[0]

        found = engine.run(both())
        engine.run(send(engine, group, weights_in(tiny_qwen3_moe), 0))
    for t in found:
        (first, _), (second, _) = ((s.weight_version, s) for s in (t.segments[0], t.segments[-1]))
        assert len(t.segments) == 2 and (first, second) == (0, 1)
        turn = t.segments[0].end
        assert not t.sampled[turn] and t.sampled[:turn].all()
        np.testing.assert_allclose(t.behavior_log_probs[:turn], naive_log_probs(reference, t, 1.0)[:turn], atol=2e-5)
        after = np.flatnonzero(t.sampled[turn:]) + turn
        np.testing.assert_allclose(t.behavior_log_probs[after], naive_log_probs(new, t, 1.0)[after], atol=2e-5)
