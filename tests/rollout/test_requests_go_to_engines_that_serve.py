"""Several engines, some of which fail in ways that a real server can't be made to: answers come from web servers."""

import asyncio
import dataclasses
from collections import Counter
from contextlib import AsyncExitStack

import numpy as np
import pytest
from aiohttp import web
from rollouts import random_prompts
from test_nonsense_from_engines_is_refused import GENERATION

from megatron_vespo.errors import RunError
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError
from megatron_vespo.rollout.fleet import MAX_FAILED_ENGINES, Fleet
from megatron_vespo.rollout.generate import generate_group

ASYNCHRONOUS = dataclasses.replace(GENERATION, weight_version=None, samples=2, vocab_size=300, deterministic=False)


class Engine:
    """A server that answers as an engine does, and is told how to go wrong."""

    def __init__(self, wrong=None, delay: float = 0.0) -> None:
        """`wrong(meta_info and output_ids of one response)` changes the answer; or is a web response."""
        self.wrong, self.delay = wrong, delay
        self.requests: list[str] = []
        self.aborted = asyncio.Event()

    async def handle(self, request: web.Request) -> web.Response:
        if request.path == "/abort_request":
            self.aborted.set()
            return web.Response()
        if request.path != "/generate":
            return web.Response(status=500)
        body = await request.json()
        self.requests += body["rid"]
        waiting = asyncio.ensure_future(self.aborted.wait())
        await asyncio.wait({waiting}, timeout=self.delay)
        if isinstance(self.wrong, int):
            return web.json_response({"error": {"message": "wrong"}}, status=self.wrong)
        answer = [
            self.response(rid, p["max_new_tokens"]) for rid, p in zip(body["rid"], body["sampling_params"], strict=True)
        ]
        return web.json_response(answer)

    def response(self, rid: str, tokens: int) -> dict:
        aborted = self.aborted.is_set()
        count = 1 if aborted and tokens > 1 else tokens
        one = {
            "output_ids": [3] * count,
            "meta_info": {
                "id": rid,
                "finish_reason": {"type": "abort", "message": "Aborted"} if count < tokens else {"type": "length"},
                "output_token_logprobs": [[-1.0, 3, None]] * count,
                "weight_versions": [{"version": "7", "start": 0, "end": count}],
            },
        }
        if self.wrong is not None:
            self.wrong(one)
        return one


def with_engines(engines: list[Engine], use, on_failure="note"):
    """`use(fleet, clients, failed)` with clients of `engines`; `failed` gets the names of those that were taken out."""

    async def main():
        async with AsyncExitStack() as stack:
            clients, failed = [], []
            for number, engine in enumerate(engines):
                app = web.Application()
                app.router.add_route("*", "/{path:.*}", engine.handle)
                runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                client = EngineClient(url, name=f"engine {number}", timeout_seconds=20)
                clients.append(await stack.enter_async_context(client))
                client.given_version = 7
            note = (lambda client, error: failed.append(client.name)) if on_failure == "note" else None
            return await use(Fleet(clients, note), clients, failed)

    return asyncio.run(main())


def test_groups_are_spread_and_each_stays_on_one_engine():
    engines = [Engine(delay=0.2) for _ in range(3)]

    async def use(fleet, clients, failed):
        await asyncio.gather(*[generate_group(fleet, prompt, ASYNCHRONOUS) for prompt in random_prompts(6)])
        assert not failed and all(client.outstanding_tokens == 0 for client in clients)

    with_engines(engines, use)
    assert [len(engine.requests) for engine in engines] == [4, 4, 4]  # 2 groups of 2
    for engine in engines:
        assert set(Counter(rid.rsplit("/", 1)[0] for rid in engine.requests).values()) == {2}


def nonsense(path: str, value):
    def change(one: dict) -> None:
        if path == "output_ids":
            one["output_ids"] = value
        else:
            one["meta_info"][path] = value

    return change


@pytest.mark.parametrize(
    "wrong",
    [
        500,
        nonsense("output_ids", [300] * 4),
        nonsense("output_token_logprobs", [[float("nan"), 3, None]] * 4),
        nonsense("output_token_logprobs", [[-1.0, 3, None]] * 3),
        nonsense("output_token_logprobs", None),
        nonsense("output_token_logprobs", [[]] * 4),
        nonsense("output_ids", [2**40] * 4),
        nonsense("weight_versions", [{"version": "6", "start": 0, "end": 4}]),
        nonsense("weight_versions", [{"version": "default", "start": 0, "end": 4}]),
        nonsense("finish_reason", {"type": "abort", "message": "out of memory", "status_code": 500}),
    ],
)
def test_an_engine_that_answers_nonsense_is_taken_out_and_another_is_asked(wrong):
    engines = [Engine(wrong), Engine()]

    async def use(fleet, clients, failed):
        group = await generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS)
        assert failed == ["engine 0"] and fleet.clients == clients[1:]
        for trajectory in group.trajectories:
            np.testing.assert_array_equal(trajectory.response_ids, [3] * 4)
            assert [s.weight_version for s in trajectory.segments] == [7]

    with_engines(engines, use)
    assert len(engines[0].requests) == len(engines[1].requests) == 2


def test_a_request_that_is_refused_is_not_the_engines_failure():
    async def use(fleet, clients, failed):
        with pytest.raises(EngineError, match="status 400: wrong"):
            await generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS)
        assert not failed and len(fleet.clients) == 2

    with_engines([Engine(400), Engine(400)], use)


def test_where_nobody_replaces_engines_the_failure_is_told():
    async def use(fleet, clients, failed):
        with pytest.raises(EngineError, match="status 500: wrong"):
            await generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS)

    with_engines([Engine(500), Engine()], use, on_failure="raise")


def test_a_group_that_brings_down_one_engine_after_the_other_ends_the_run():
    async def use(fleet, clients, failed):
        with pytest.raises(
            RunError, match=rf"prompt .*: {MAX_FAILED_ENGINES} engines failed one after the other.*wrong"
        ):
            await generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS)
        assert len(failed) == MAX_FAILED_ENGINES

    with_engines([Engine(500) for _ in range(MAX_FAILED_ENGINES + 1)], use)


def test_what_waits_for_an_engine_that_is_taken_out_goes_elsewhere_at_once():
    engines = [Engine(delay=15), Engine()]

    async def use(fleet, clients, failed):
        sampling = asyncio.create_task(generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS))
        while not engines[0].requests:
            await asyncio.sleep(0.01)
        fleet.failed(clients[0], RunError("hung"))
        await asyncio.wait_for(sampling, 10)
        assert failed == ["engine 0"]

    with_engines(engines, use)


def test_with_no_engine_requests_wait_for_one():
    engines = [Engine(500), Engine()]

    async def use(fleet, clients, failed):
        late = fleet.clients.pop()
        sampling = asyncio.create_task(generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS))
        while not failed:
            await asyncio.sleep(0.01)
        assert not sampling.done() and not fleet.clients
        fleet.add(late)
        await asyncio.wait_for(sampling, 10)

    with_engines(engines, use)


def test_responses_that_are_aborted_go_on_where_they_were_and_keep_what_they_have():
    engines = [Engine(delay=15), Engine()]

    async def use(fleet, clients, failed):
        sampling = asyncio.create_task(generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS))
        while not engines[0].requests:
            await asyncio.sleep(0.01)
        assert await fleet.hold("abort") == 1
        assert clients[0].gate.passing == 0
        await fleet.release()
        group = await asyncio.wait_for(sampling, 10)
        assert not failed and all(len(t.response_ids) == 4 and len(t.segments) > 1 for t in group.trajectories)

    with_engines(engines, use)
    assert not engines[1].requests


def test_an_engine_that_fails_while_its_requests_are_held_leaves_nobody_waiting():
    engines = [Engine(delay=15), Engine()]

    async def use(fleet, clients, failed):
        sampling = asyncio.create_task(generate_group(fleet, random_prompts(1)[0], ASYNCHRONOUS))
        while not engines[0].requests:
            await asyncio.sleep(0.01)
        holding = asyncio.create_task(fleet.hold("wait"))
        await asyncio.sleep(0.05)
        assert not holding.done()
        fleet.failed(clients[0], RunError("hung"))
        assert await asyncio.wait_for(holding, 10) == 1
        assert not sampling.done() and not engines[1].requests  # its gate is closed too
        await fleet.release()
        await asyncio.wait_for(sampling, 10)

    with_engines(engines, use)
    assert len(engines[1].requests) == 2
