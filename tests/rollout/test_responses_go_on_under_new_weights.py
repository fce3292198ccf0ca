"""A weight update in the middle of long responses: whose routes are recorded, and under which weights they were chosen."""

import asyncio

import numpy as np
import pytest
from broadcast import group_with, send, update
from held_weights import weights_in
from rollouts import collect, random_prompts, settings_of
from test_engine_equals_transformers import naive_log_probs
from tiny_engine import ROUTE_SHAPE, write_tiny_qwen3_moe
from transformers_routes import load, routes_of, share_equal, tokens_of

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.generate import generate_groups

pytestmark = pytest.mark.engine

LONG = RolloutConfig(group_size=3, max_response_tokens=150, deterministic=True)
ANY_WEIGHTS = {"weight_version": None, "routes": ROUTE_SHAPE, "stop_token_ids": [2]}


@pytest.fixture(scope="module")
def old(tiny_qwen3_moe):
    return load(tiny_qwen3_moe)


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "model"
    write_tiny_qwen3_moe(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def new(other_weights):
    return load(other_weights)


def generate_and_interrupt(engine, prompts, rollout, interruption):
    """Trajectories of `prompts`, with `interruption` beside their generation."""
    settings = settings_of(engine) | ANY_WEIGHTS

    async def generate():
        stream = generate_groups(engine.fleet, prompts, rollout, **settings)
        return [t async for group in stream for t in group.trajectories]

    async def both():
        return (await asyncio.gather(generate(), interruption()))[0]

    return engine.run(both())


async def sampled_tokens(engine, tokens: int) -> None:
    """Returns when another request, sampled beside the others, has got so many tokens."""
    params = {"max_new_tokens": tokens, "ignore_eos": True, "sampling_seed": 1}
    await engine.client.generate([[7, 8, 9]], [params], ["clock"])


async def requests_wait(engine) -> None:
    """Returns when the engine has a queue of requests that it cannot run yet."""
    async with asyncio.timeout(60):
        while (await engine.client._request("GET", "/v1/loads", None))["loads"][0]["num_waiting_reqs"] < 20:
            await asyncio.sleep(0.02)


def two_prompts():
    return random_prompts(2, seed=21)


def test_each_segment_has_the_routes_of_its_own_weights(engine, old, new, other_weights):
    with group_with(engine) as group:

        async def interruption():
            await sampled_tokens(engine, 20)
            await engine.client.pause_generation("abort")
            await send(engine, group, weights_in(other_weights), 1)
            await engine.client.continue_generation()

        found = generate_and_interrupt(engine, two_prompts(), LONG, interruption)
        update(engine, group, weights_in(engine.model_path), weight_version=0)

    interrupted = [t for t in found if len(t.segments) > 1]
    assert len(interrupted) >= 3
    for t in interrupted:
        first, second = t.segments
        assert (first.start, first.end) == (0, second.start) and second.end == len(t.response_ids)
        assert (first.weight_version, second.weight_version) == (0, 1)
        assert second.request_id == f"{first.request_id}/1"
        assert len(t.response_ids) == 150 if t.finish_reason == "length" else t.response_ids[-1] == 2

        tokens, routes = tokens_of(t), t.engine_routes
        # Position i decides token i + 1: the first that decided a token of the second segment.
        boundary = len(t.prompt.token_ids) + first.end - 1
        assert len(routes) == len(tokens) - 1
        assert routes.recorded.all() and not routes.masked
        np.testing.assert_array_equal(routes.weight_versions, np.where(np.arange(len(routes)) < boundary, 0, 1))
        under_old, under_new = routes_of(old, tokens), routes_of(new, tokens)
        np.testing.assert_array_equal(routes.experts[:boundary], under_old[:boundary])
        np.testing.assert_array_equal(routes.experts[boundary:], under_new[boundary:])
        # The test could not tell one from the other if both weights chose the same.
        for span in (slice(0, boundary), slice(boundary, None), slice(boundary, boundary + 1)):
            assert share_equal(under_old[span], under_new[span]) < 0.6

        log_probs_old, log_probs_new = naive_log_probs(old, t, 1.0), naive_log_probs(new, t, 1.0)
        expected = np.where(np.arange(len(t.response_ids)) < first.end, log_probs_old, log_probs_new)
        np.testing.assert_allclose(t.behavior_log_probs, expected, atol=1e-5)


def test_an_abort_changes_no_token_where_the_weights_stay(engine):
    """The noise of a sample depends on its seed and the position, not on the request."""

    async def interruption():
        for _ in range(2):
            await sampled_tokens(engine, 10)
            await engine.client.pause_generation("abort")
            await engine.client.continue_generation()

    found = generate_and_interrupt(engine, two_prompts(), LONG, interruption)
    assert max(len(t.segments) for t in found) == 3
    whole = collect(engine, two_prompts(), LONG, routes=ROUTE_SHAPE)
    for t in found:
        expected = whole[t.prompt.identity].trajectories[t.sample]
        np.testing.assert_array_equal(t.response_ids, expected.response_ids)
        np.testing.assert_allclose(t.behavior_log_probs, expected.behavior_log_probs, atol=1e-5)
        np.testing.assert_array_equal(t.engine_routes.experts, expected.engine_routes.experts)
        assert t.finish_reason == expected.finish_reason


def test_what_waited_for_its_first_token_starts_again(engine, old):
    """More requests than the engine runs at once: those in its queue are aborted without a token."""
    prompts = random_prompts(400, seed=5)
    rollout = RolloutConfig(group_size=3, max_response_tokens=8, deterministic=True, concurrent_groups=400)

    async def interruption():
        await requests_wait(engine)
        await engine.client.pause_generation("abort")
        await engine.client.continue_generation()

    found = generate_and_interrupt(engine, prompts, rollout, interruption)
    assert len(found) == 1200
    again = [t for t in found if len(t.segments) == 1 and t.segments[0].request_id.endswith(f"/{t.sample}/1")]
    assert again
    for t in again[:20]:
        np.testing.assert_array_equal(t.engine_routes.experts, routes_of(old, tokens_of(t)))
    assert all(t.engine_routes.recorded.all() for t in found)


def test_nothing_is_recorded_of_a_request_that_saw_two_weights(engine, other_weights):
    with group_with(engine) as group:

        async def interruption():
            await sampled_tokens(engine, 20)
            await engine.client.pause_generation("in_place")
            await send(engine, group, weights_in(other_weights), 1, flush_cache=False)
            await engine.client.continue_generation()

        found = generate_and_interrupt(engine, two_prompts(), LONG, interruption)
        update(engine, group, weights_in(engine.model_path), weight_version=0)

    assert sum(len(t.segments) > 1 for t in found) >= 3
    for t in found:
        positions, mixed = len(tokens_of(t)) - 1, len(t.segments) > 1
        assert len(t.engine_routes) == positions
        if mixed:
            assert [s.weight_version for s in t.segments] == [0, 1]
            assert len({s.request_id for s in t.segments}) == 1
        assert t.engine_routes.masked == ({"mixed_versions": positions} if mixed else {})
        assert (t.engine_routes.recorded == (not mixed)).all()
