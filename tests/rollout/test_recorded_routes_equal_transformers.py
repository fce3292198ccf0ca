import asyncio
import re
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from broadcast import group_with, update
from held_weights import weights_in
from rollouts import collect, random_prompts
from test_engine_equals_transformers import naive_log_probs
from test_servers_leave_nothing_behind import wait_until
from tiny_engine import ROUTE_SHAPE, RunningEngine, running_engine, write_tiny_qwen3_moe
from transformers_routes import load, routes_of, tokens_of

from megatron_vespo.config import RolloutConfig, SamplingConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.routing_probe import sample_probe
from megatron_vespo.orchestration.supervision import Supervisor
from megatron_vespo.rollout.generate import generate_responses
from megatron_vespo.rollout.trajectory import Trajectory
from megatron_vespo.routing.codec import decode

pytestmark = pytest.mark.engine

DETERMINISTIC = RolloutConfig(group_size=3, max_response_tokens=24, deterministic=True)
PLAIN = DETERMINISTIC.model_copy(update={"deterministic": False})


@pytest.fixture(scope="module")
def reference(tiny_qwen3_moe):
    return load(tiny_qwen3_moe)


@pytest.fixture(scope="module")
def plain_engine(tiny_qwen3_moe, tmp_path_factory) -> Iterator[RunningEngine]:
    """Deterministic SGLang has no prefix cache here; this one has."""
    log = tmp_path_factory.mktemp("plain") / "engine.log"
    with running_engine(tiny_qwen3_moe, log, deterministic=False, return_routed_experts=True) as engine:
        yield engine


def trajectories(engine, prompts, rollout, **changes):
    groups = collect(engine, prompts, rollout, routes=ROUTE_SHAPE, **changes)
    return [t for group in groups.values() for t in group.trajectories]


def test_every_position_but_the_last_has_its_routes(engine, reference):
    found = trajectories(engine, random_prompts(8), DETERMINISTIC)
    for t in found:
        expected = routes_of(reference, tokens_of(t))
        assert len(expected) == len(t.prompt.token_ids) + len(t.response_ids) - 1
        np.testing.assert_array_equal(t.engine_routes.experts, expected)
        assert t.engine_routes.experts.dtype == np.uint8
        assert t.engine_routes.recorded.all() and not t.engine_routes.masked
        assert (t.engine_routes.weight_versions == 0).all()


def test_nothing_is_recorded_where_it_is_not_asked_for(engine):
    async def evaluate():
        stream = generate_responses(
            engine.fleet,
            random_prompts(1),
            SamplingConfig(),
            samples_per_prompt=1,
            max_response_tokens=4,
            deterministic=True,
            concurrent_groups=1,
            stop_token_ids=[2],
            vocab_size=engine.vocab_size,
            run_seed=1,
            weight_version=0,
        )
        return [group async for group in stream]

    (group,) = engine.run(evaluate())
    assert group.trajectories[0].engine_routes is None
    (group,) = collect(engine, random_prompts(1), DETERMINISTIC).values()
    assert all(t.engine_routes is None for t in group.trajectories)


def prefill_tokens(log: str) -> list[int]:
    """Of each prefill batch; the engine tells some time after it."""
    return [int(number) for number in re.findall(r"Prefill batch.*?#new-token: (\d+),", log)]


def test_a_prefill_batch_may_be_larger_than_the_number_of_running_requests(engine, reference):
    """SGLang's own buffer would have a row for each running request, of which there are less than a thousand."""
    rng = np.random.default_rng(9)
    inputs = [rng.integers(4, 299, 200) for _ in range(12)]
    log = engine.server._log_path
    written = log.stat().st_size
    outputs = engine.run(
        engine.client.generate(
            [ids.tolist() for ids in inputs],
            [{"max_new_tokens": 1, "temperature": 0.0}] * len(inputs),
            [f"large/{number}" for number in range(len(inputs))],
            return_routed_experts=True,
        )
    )
    assert wait_until(lambda: max(prefill_tokens(log.read_bytes()[written:].decode()), default=0) > 1000, 10)
    for ids, output in zip(inputs, outputs, strict=True):
        full = np.concatenate([ids, output.token_ids])
        found = decode(output.routed_experts, rows=200, moe_layers=(True, True), topk=2, num_experts=8)
        np.testing.assert_array_equal(found, routes_of(reference, full))


def test_cached_prompts_have_their_routes(plain_engine, reference):
    prompts = random_prompts(4, seed=11)
    trajectories(plain_engine, prompts, PLAIN)
    cached = plain_engine.run(
        plain_engine.client.generate(
            [p.token_ids.tolist() for p in prompts],
            [{"max_new_tokens": 1}] * 4,
            [f"cached/{p.identity}" for p in prompts],
        )
    )
    assert all(output.cached_tokens == len(p.token_ids) - 1 for output, p in zip(cached, prompts, strict=True))
    for t in trajectories(plain_engine, prompts, PLAIN):
        np.testing.assert_array_equal(t.engine_routes.experts, routes_of(reference, tokens_of(t)))
        assert t.engine_routes.recorded.all()


def test_routes_out_of_a_cache_of_older_weights_are_masked(plain_engine, reference, tmp_path):
    engine = plain_engine
    write_tiny_qwen3_moe(tmp_path / "other", seed=1)
    prompts = random_prompts(3, seed=12)
    fresh = Prompt("fresh", "", np.arange(100, 130, dtype=np.int32), 0, None)
    trajectories(engine, prompts, PLAIN)
    with group_with(engine) as group:
        update(engine, group, weights_in(tmp_path / "other"), weight_version=1, flush_cache=False)
        found = trajectories(engine, [*prompts, fresh], PLAIN, weight_version=1, cache_version=0)
        for t in (t for t in found if t.prompt is not fresh):
            cached, positions = len(t.prompt.token_ids) - 1, len(tokens_of(t)) - 1
            routes = t.engine_routes
            assert routes.masked == {"older_cache": cached}
            np.testing.assert_array_equal(routes.recorded, np.arange(positions) >= cached)
            np.testing.assert_array_equal(routes.weight_versions, np.where(np.arange(positions) < cached, 0, 1))
            np.testing.assert_array_equal(routes.experts[:cached], routes_of(reference, t.prompt.token_ids))
        new = load(tmp_path / "other")
        for t in (t for t in found if t.prompt is fresh):
            # The others may have found its prompt in the cache, and the engine does not say how old that is.
            assert t.engine_routes.recorded.all() or t.sample > 0
            np.testing.assert_array_equal(t.engine_routes.experts, routes_of(new, tokens_of(t)))

        engine.run(engine.client.flush_cache())
        for t in trajectories(engine, prompts, PLAIN, weight_version=1, cache_version=1):
            assert t.engine_routes.recorded.all() and not t.engine_routes.masked
            np.testing.assert_array_equal(t.engine_routes.experts, routes_of(new, tokens_of(t)))
        update(engine, group, weights_in(engine.model_path), weight_version=0)


def test_evaluations_and_probes_use_nothing_that_older_weights_computed(plain_engine, reference, tmp_path):
    """The same prompts under two weights, and the engine keeps its cache: log-probs are of a model without one."""
    engine = plain_engine
    write_tiny_qwen3_moe(tmp_path / "other", seed=1)
    new, prompts = load(tmp_path / "other"), random_prompts(3, seed=13)

    async def evaluate(version: int) -> list[Trajectory]:
        stream = generate_responses(
            engine.fleet,
            prompts,
            SamplingConfig(),
            samples_per_prompt=2,
            max_response_tokens=6,
            deterministic=False,
            concurrent_groups=3,
            stop_token_ids=[2],
            vocab_size=engine.vocab_size,
            run_seed=1,
            weight_version=version,
        )
        return [t async for group in stream for t in group.trajectories]

    async def probe(version: int) -> list[Trajectory]:
        session = SimpleNamespace(
            config=SimpleNamespace(rollout=PLAIN, seed=1),
            sampler=SimpleNamespace(
                fleet=engine.fleet,
                tokenizer=SimpleNamespace(stop_token_ids=[2]),
                vocab_size=engine.vocab_size,
                supervisor=Supervisor(),
            ),
            engines=SimpleNamespace(waiting=[], came_back=asyncio.Event().wait),
            progress=SimpleNamespace(step=version),
            routing_shape=ROUTE_SHAPE,
            held_out=prompts,
        )
        groups = await sample_probe(session, "probe", 3, samples=2, max_tokens=6)  # type: ignore[arg-type]
        return [t for group in groups for t in group.trajectories]

    def largest_error(found: list[Trajectory], model) -> float:
        return max(np.abs(t.behavior_log_probs - naive_log_probs(model, t, 1.0)).max() for t in found)

    # Once the prompts are in the cache, also of what names no weights.
    for found in (trajectories(engine, prompts, PLAIN), engine.run(evaluate(0)), engine.run(probe(0))):
        assert largest_error(found, reference) < 1e-5
    with group_with(engine) as group:
        update(engine, group, weights_in(tmp_path / "other"), weight_version=1, flush_cache=False)
        # What the cache is kept for: it would be found if it were used.
        assert largest_error(trajectories(engine, prompts, PLAIN, weight_version=1, cache_version=0), new) > 1e-3
        for _ in range(2):
            assert largest_error(engine.run(evaluate(1)), new) < 1e-5
            probed = engine.run(probe(1))
            assert largest_error(probed, new) < 1e-5
            for t in probed:
                np.testing.assert_array_equal(t.engine_routes.experts, routes_of(new, tokens_of(t)))
                assert t.engine_routes.recorded.all()
        update(engine, group, weights_in(engine.model_path), weight_version=0)


def test_a_cache_key_parts_what_is_cached(plain_engine):
    engine, (prompt,) = plain_engine, random_prompts(1, seed=14)

    def cached(number: int, key: str | None) -> int:
        asked = [prompt.token_ids.tolist()], [{"max_new_tokens": 1}], [f"key/{number}"]
        (output,) = engine.run(engine.client.generate(*asked, cache_key=key))
        return output.cached_tokens

    whole = len(prompt.token_ids) - 1
    found = [cached(number, key) for number, key in enumerate([None, None, "1", "1", "2", None])]
    assert found == [0, whole, 0, whole, 0, whole]
