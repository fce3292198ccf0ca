"""Groups of responses from engines: one request a group, each sample with a seed of its own."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from megatron_vespo.config import ConfigError, RolloutConfig, SamplingConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rollout.engine_http import EngineError
from megatron_vespo.rollout.engine_output import EngineOutput
from megatron_vespo.rollout.fleet import Fleet, Place
from megatron_vespo.rollout.generation import Environment, Generation, ending_of, request_id, sampling_params
from megatron_vespo.rollout.response_checks import Nonsense, ResponseError, check, check_versions
from megatron_vespo.rollout.segments import Response
from megatron_vespo.rollout.trajectory import FinishReason, Group, Trajectory
from megatron_vespo.routing.routes import RoutingShape

MAX_FRUITLESS_REQUESTS = 100
"""In a row, of one response: a pause that finds it waiting each time would be bad luck, but this is something else."""


def generate_groups(
    fleet: Fleet,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    *,
    stop_token_ids: Sequence[int],
    vocab_size: int,
    run_seed: int,
    batch_index: int,
    weight_version: int | None,
    cache_version: int | None = None,
    routes: RoutingShape | None = None,
    environment: Environment | None = None,
) -> AsyncIterator[Group]:
    """The groups of rollout batch `batch_index`, in the order of their completion; `text` is left to the caller.

    Arguments are those of `Generation`. With `routes` each trajectory has `engine_routes`; those that are missing, broken
    or of uncertain origin are masked and counted there.

    Raises:
        EngineError: an engine refused a request; or failed, and nobody replaces it.
        ResponseError: a response that is not what was asked for (see `check`).
        RunError: several engines failed one after the other with requests of one group.
    """
    generation = Generation.of_rollout(
        rollout,
        stop_token_ids=stop_token_ids,
        vocab_size=vocab_size,
        run_seed=run_seed,
        stream=f"rollout/{batch_index}",
        weight_version=weight_version,
        cache_version=cache_version,
        routes=routes,
        environment=environment,
    )
    return generate(fleet, prompts, generation)


def generate_responses(
    fleet: Fleet,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    samples_per_prompt: int,
    max_response_tokens: int,
    deterministic: bool,
    concurrent_groups: int,
    stop_token_ids: Sequence[int],
    vocab_size: int,
    run_seed: int,
    weight_version: int,
    environment: Environment | None = None,
) -> AsyncIterator[Group]:
    """For evaluation: any sampling parameters; the same seeds, and so the same noise, in every evaluation of a run. No
    routes are recorded, and no lengths are drawn; nothing that other weights computed is used, whatever engines keep.

    Raises:
        ConfigError: min_p in deterministic mode, which SGLang's seeded sampling does not have.
        EngineError, ResponseError: as `generate_groups`.
    """
    if deterministic and sampling.min_p > 0:
        raise ConfigError(
            f"sampling.min_p = {sampling.min_p} cannot be sampled with rollout.deterministic: set it to 0"
        )
    generation = Generation(
        samples=samples_per_prompt,
        sampling=sampling,
        max_response_tokens=max_response_tokens,
        deterministic=deterministic,
        concurrent_groups=concurrent_groups,
        stop_token_ids=tuple(stop_token_ids),
        vocab_size=vocab_size,
        run_seed=run_seed,
        stream="evaluation",
        weight_version=weight_version,
        cache_of_version_only=True,
        environment=environment,
    )
    return generate(fleet, prompts, generation)


async def generate(fleet: Fleet, prompts: Sequence[Prompt], generation: Generation) -> AsyncIterator[Group]:
    """At most `concurrent_groups` requests at once. When a request fails, or the caller stops, the others are dropped."""
    waiting = deque(prompts)
    running: set[asyncio.Task[Group]] = set()
    try:
        while waiting or running:
            while waiting and len(running) < generation.concurrent_groups:
                running.add(asyncio.create_task(generate_group(fleet, waiting.popleft(), generation)))
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                group = task.result()
                running.discard(task)
                yield group
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def generate_group(fleet: Fleet, prompt: Prompt, generation: Generation) -> Group:
    """All responses to one prompt, from one engine as long as it serves."""
    token_ids = prompt.token_ids.tolist()
    # An id beyond the embedding would not be refused by the engine: it would kill it.
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= generation.vocab_size:
        raise ConfigError(
            f"prompt {prompt.identity}: its token ids are not all within the model's vocabulary of "
            f"{generation.vocab_size}: the tokenizer does not belong to this model"
        )
    place = Place(fleet, f"prompt {prompt.identity}")
    responses = [Response(prompt, sample) for sample in range(generation.samples)]
    outputs = await request(place, generation, responses)
    trajectories = await all_or_none(
        [complete(place, generation, response, output) for response, output in zip(responses, outputs, strict=True)]
    )
    return Group(prompt, trajectories)


async def complete(place: Place, generation: Generation, response: Response, output: EngineOutput) -> Trajectory:
    """The whole of a response of which `output` is the first part: as often as it is aborted, or an environment answers,
    a new request goes on.

    The engine's gate holds that request for as long as it is closed.
    """
    ending = ending_of(generation, response)
    while True:
        await response.add(output, generation.routes, generation.cache_version)
        finish = response.finish_reason(ending)
        if finish is not None and (finish := await after_turn(generation, response, finish)) is not None:
            return response.trajectory(finish)
        if response.fruitless >= MAX_FRUITLESS_REQUESTS:
            raise ResponseError(
                f"{response.name}: aborted {response.fruitless} times before its next token: {output.finish_detail}"
            )
        (output,) = await request(place, generation, [response])


async def after_turn(generation: Generation, response: Response, finish: FinishReason) -> FinishReason | None:
    """How the response ended with a turn that ended so; None: an environment has answered it, and it goes on."""
    if generation.environment is None or finish != "stop":
        return finish
    said = await generation.environment(response)
    if said is None:
        return finish
    if response.num_tokens + len(said) >= generation.max_response_tokens:
        return "length"
    response.observe(said)
    return None


async def request(place: Place, generation: Generation, responses: list[Response]) -> list[EngineOutput]:
    """What the engine samples next of each response, checked, in one request.

    Where the engine fails, or returns nonsense, another one is asked: nothing is lost but what the first had sampled in
    this request.
    """
    while True:
        client = await place.client()
        before = client.given_version
        try:
            outputs = await client.generate(
                [response.input_ids for response in responses],
                [sampling_params(generation, response) for response in responses],
                [request_id(generation, response) for response in responses],
                return_routed_experts=generation.routes is not None,
                routed_experts_start_len=responses[0].first_position,
                cache_key=generation.cache_key,
            )
            for response, output in zip(responses, outputs, strict=True):
                left = ending_of(generation, response).max_tokens - response.num_tokens
                check(output, generation, response.name, left)
                check_versions(output, before, client.given_version, response.name)
            place.answered()
            return outputs
        except (EngineError, Nonsense) as error:
            if isinstance(error, EngineError) and error.refused:
                raise
            place.failed(client, error)


async def all_or_none(work: Sequence[Coroutine[Any, Any, Trajectory]]) -> list[Trajectory]:
    """When one fails, the others are dropped."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
