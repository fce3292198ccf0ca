import asyncio
import dataclasses
import pickle

import numpy as np
import pytest
from aiohttp import web
from rollouts import random_prompts

from megatron_vespo.config import ConfigError, RolloutConfig, SamplingConfig
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError
from megatron_vespo.rollout.engine_log import first_cause, says_why
from megatron_vespo.rollout.engine_output import EngineOutput, WeightSpan
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generate import generate_groups, generate_responses
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.response_checks import ResponseError, check

GENERATION = Generation(
    samples=1,
    sampling=SamplingConfig(),
    max_response_tokens=4,
    deterministic=True,
    concurrent_groups=1,
    stop_token_ids=(2,),
    vocab_size=10,
    run_seed=1,
    stream="rollout/0",
    weight_version=7,
)
GOOD = EngineOutput(
    request_id="r",
    token_ids=np.array([3, 4, 2], dtype=np.int32),
    log_probs=np.array([-1.0, -2.0, 0.0], dtype=np.float32),
    finish_reason="stop",
    finish_detail="",
    weight_spans=(WeightSpan("7", 0, 3),),
    cached_tokens=0,
    retractions=0,
)


def test_a_good_response_passes():
    check(GOOD, GENERATION, "response", 4)
    in_two = dataclasses.replace(GOOD, weight_spans=(WeightSpan("7", 0, 1), WeightSpan("7", 1, 3)))
    check(in_two, GENERATION, "response", 4)
    retracted = dataclasses.replace(GOOD, retractions=1)
    check(retracted, dataclasses.replace(GENERATION, deterministic=False), "response", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "abort", "finish_detail": "out of memory"}, "abort out of memory"),
        ({"token_ids": np.array([3, 10, 2])}, "token id 10"),
        ({"token_ids": np.array([3, -1, 2])}, "token id"),
        ({"token_ids": np.array([], dtype=np.int32)}, "0 tokens"),
        ({"log_probs": np.array([-1.0, np.nan, -1.0])}, "not finite"),
        ({"log_probs": np.array([-1.0, -np.inf, -1.0])}, "not finite"),
        ({"log_probs": np.array([-1.0, 0.5, -1.0])}, "above 0"),
        ({"log_probs": np.array([-1.0, -1.0])}, "3 tokens but 2 log-probs"),
        ({"finish_reason": "length"}, "cut after 3 of 4"),
        ({"weight_spans": (WeightSpan("7", 0, 2),)}, "do not cover"),
        ({"weight_spans": ()}, "do not cover"),
        ({"weight_spans": (WeightSpan("6", 0, 1), WeightSpan("7", 1, 3))}, "expected 7"),
        ({"retractions": 1}, "rollout.engine.max_total_tokens"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changes, message):
    with pytest.raises(ResponseError, match=message):
        check(dataclasses.replace(GOOD, **changes), GENERATION, "response", 4)


def against(handler, use):
    """`use(client)` with a client of a server that answers every request with `handler`."""

    async def main():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with EngineClient(f"http://127.0.0.1:{port}", timeout_seconds=0.3) as client:
                return await use(client)
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def test_every_wait_has_a_named_deadline():
    async def silent(_):
        await asyncio.sleep(30)

    with pytest.raises(
        EngineError, match=r"/generate: no answer within 0 s \(deadline of 'generate' requests\)"
    ) as error:
        against(silent, lambda client: client.generate([[1]], [{}], ["r"]))
    assert error.value.status is None
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_errors_say_endpoint_status_and_first_line():
    async def refuse(_):
        return web.json_response({"error": {"message": "too long\nsecond line"}}, status=400)

    with pytest.raises(EngineError, match=r"/begin_weight_update: status 400: too long$"):
        against(refuse, lambda client: client.begin_weight_update())

    async def unsuccessful(_):
        return web.json_response({"success": False, "message": "no such group"})

    with pytest.raises(EngineError, match="not successful: no such group"):
        against(unsuccessful, lambda client: client.destroy_weights_update_group("g"))

    async def short(_):
        return web.json_response([])

    with pytest.raises(EngineError, match="expected a list of 1 responses"):
        against(short, lambda client: client.generate([[1]], [{}], ["r"]))


def test_a_failed_group_drops_the_others_at_once():
    dropped = []

    async def fail_one(request):
        body = await request.json()
        if body["rid"][0].endswith("/1/0"):
            return web.json_response({"error": {"message": "broken"}}, status=500)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            dropped.append(body["rid"][0])
            raise

    async def use(client):
        client._deadlines["generate"] = 20
        rollout = RolloutConfig(group_size=2, concurrent_groups=4)
        stream = generate_groups(
            Fleet([client]),
            random_prompts(4),
            rollout,
            stop_token_ids=[2],
            vocab_size=300,
            run_seed=1,
            batch_index=0,
            weight_version=0,
        )
        return [group async for group in stream]

    with pytest.raises(EngineError, match="broken"):
        against(fail_one, use)
    assert len(dropped) == 3


def test_prompts_of_another_tokenizer_never_reach_the_engine():
    async def never(_):
        raise AssertionError("a request was sent")

    async def use(client):
        settings = {"stop_token_ids": [2], "vocab_size": 20, "run_seed": 1, "batch_index": 0, "weight_version": 0}
        return [
            g async for g in generate_groups(Fleet([client]), random_prompts(1, low=20), RolloutConfig(), **settings)
        ]

    with pytest.raises(ConfigError, match="the tokenizer does not belong to this model"):
        against(never, use)


def test_min_p_with_seeds_is_refused():
    with pytest.raises(ConfigError, match="min_p"):
        generate_responses(
            Fleet(),
            [],
            SamplingConfig(min_p=0.1),
            samples_per_prompt=1,
            max_response_tokens=1,
            deterministic=True,
            concurrent_groups=1,
            stop_token_ids=[],
            vocab_size=10,
            run_seed=1,
            weight_version=0,
        )


LOG = """[2026-01-01 00:00:00] Ignore import error when loading a: Traceback (most recent call last):
ImportError: harmless
[2026-01-01 00:00:01] post-warmup freeze_gc failed
Traceback (most recent call last):
  File "a.py", line 1, in f
ConnectionRefusedError: [Errno 111] harmless
[2026-01-01 00:00:02] Scheduler hit an exception: Traceback (most recent call last):
  File "b.py", line 2, in g
RuntimeError: the root
of it

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "c.py", line 3, in h
ValueError: a consequence

[2026-01-01 00:00:03] Received sigquit from a child process. It usually means the child failed.
"""


def test_the_first_cause_is_found_in_a_log():
    assert first_cause(LOG) == "RuntimeError: the root\nof it"
    assert first_cause("serve.py: error: unrecognized arguments: --nope\n") == (
        "serve.py: error: unrecognized arguments: --nope"
    )
    assert first_cause("") == "it printed nothing"
    harmless = LOG[: LOG.index("[2026-01-01 00:00:02]")]
    assert says_why(LOG) and not says_why(harmless)
