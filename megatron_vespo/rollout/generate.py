"""Groups of responses from an engine: one request a group, each sample with a seed of its own."""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vespo.config import ConfigError, RolloutConfig, SamplingConfig
from megatron_vespo.errors import RunError
from megatron_vespo.rollout.client import EngineError, EngineOutput
from megatron_vespo.rollout.fleet import Fleet, Place
from megatron_vespo.rollout.segments import Response, covers, was_paused
from megatron_vespo.rollout.trajectory import Group, Prompt, Trajectory
from megatron_vespo.routing.routes import RoutingShape

MAX_FRUITLESS_REQUESTS = 100
"""In a row, of one response: a pause that finds it waiting each time would be bad luck, but this is something else."""


class ResponseError(RunError):
    """A response that is not what was asked for, and would not be elsewhere: a setting is wrong."""


class Nonsense(ResponseError):
    """The engine returned something that cannot have been sampled as asked: it is broken."""


@dataclass(frozen=True)
class Generation:
    """What the requests of one batch have in common.

    Attributes:
        samples: responses to each prompt.
        stop_token_ids: end a response, which keeps it. The engine stops at the eos ids of the model's config as well;
            where responses may be aborted and go on, these must be among them.
        vocab_size: of the model; ids from 0 to vocab_size - 1 exist.
        stream: what the seeds and request ids of this batch start with, e.g. "rollout/12".
        weight_version: which every token must have been sampled under. None: weights may change at any time, and a
            response that is aborted for it goes on under the new ones.
        cache_version: oldest weights under which something in the engine's prefix cache may have been computed; None:
            the cache is emptied at each change of weights.
        routes: what the engine's routes look like; None: they are not asked for.
    """

    samples: int
    sampling: SamplingConfig
    max_response_tokens: int
    deterministic: bool
    concurrent_groups: int
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    run_seed: int
    stream: str
    weight_version: int | None
    cache_version: int | None = None
    routes: RoutingShape | None = None


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
) -> AsyncIterator[Group]:
    """The groups of rollout batch `batch_index`, in the order of their completion; `text` is left to the caller.

    Arguments are those of `Generation`. With `routes` each trajectory has `engine_routes`; those that are missing, broken
    or of uncertain origin are masked and counted there.

    Raises:
        EngineError: an engine refused a request; or failed, and nobody replaces it.
        ResponseError: a response that is not what was asked for (see `check`).
        RunError: several engines failed one after the other with requests of one group.
    """
    generation = Generation(
        samples=rollout.group_size,
        sampling=rollout.sampling,
        max_response_tokens=rollout.max_response_tokens,
        deterministic=rollout.deterministic,
        concurrent_groups=rollout.concurrent_groups,
        stop_token_ids=tuple(stop_token_ids),
        vocab_size=vocab_size,
        run_seed=run_seed,
        stream=f"rollout/{batch_index}",
        weight_version=weight_version,
        cache_version=cache_version,
        routes=routes,
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
) -> AsyncIterator[Group]:
    """For evaluation: any sampling parameters; the same seeds, and so the same noise, in every evaluation of a run. No
    routes are recorded.

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
    """The whole of a response of which `output` is the first part: as often as it is aborted, a new request goes on.

    The engine's gate holds that request for as long as it is closed.
    """
    while True:
        await response.add(output, generation.routes, generation.cache_version)
        finish = response.finish_reason(generation.max_response_tokens, generation.stop_token_ids)
        if finish is not None:
            return response.trajectory(finish)
        if response.fruitless >= MAX_FRUITLESS_REQUESTS:
            raise ResponseError(
                f"{response.name}: aborted {response.fruitless} times before its next token: {output.finish_detail}"
            )
        (output,) = await request(place, generation, [response])


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
                [
                    sampling_params(generation, response.prompt.identity, response.sample, response.num_tokens)
                    for response in responses
                ],
                [request_id(generation, response) for response in responses],
                return_routed_experts=generation.routes is not None,
                routed_experts_start_len=responses[0].first_position,
            )
            for response, output in zip(responses, outputs, strict=True):
                check(output, generation, response.name, response.num_tokens)
                check_versions(output, before, client.given_version, response.name)
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


def request_id(generation: Generation, response: Response) -> str:
    first = f"{generation.stream}/{response.prompt.identity}/{response.sample}"
    return first if not response.requests else f"{first}/{response.requests}"


def sampling_params(generation: Generation, identity: str, sample: int, sampled: int = 0) -> dict[str, Any]:
    """SGLang's parameters of one sample that has `sampled` tokens already.

    Without deterministic inference it ignores seeds, so none is sent. With it, a token's noise depends on the seed and
    the token's position in prompt and response, so a response that goes on keeps its seed.
    """
    chosen = generation.sampling
    params: dict[str, Any] = {
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "top_k": chosen.top_k,
        "min_p": chosen.min_p,
        "frequency_penalty": chosen.frequency_penalty,
        "presence_penalty": chosen.presence_penalty,
        "repetition_penalty": chosen.repetition_penalty,
        "max_new_tokens": generation.max_response_tokens - sampled,
        "stop_token_ids": list(generation.stop_token_ids),
    }
    if chosen.logit_bias:
        params["logit_bias"] = chosen.logit_bias
    if generation.deterministic:
        params["sampling_seed"] = sample_seed(generation.run_seed, generation.stream, identity, sample)
    return params


def sample_seed(run_seed: int, stream: str, identity: str, sample: int) -> int:
    """A seed for one sample, 0 <= seed < 2^63: the noise of SGLang's sampler depends only on it, position and token.

    The first 8 bytes, big endian, without the highest bit, of BLAKE2b over the four values, each as text behind its
    length. The same on every machine and in every version of Python.
    """
    digest = hashlib.blake2b(digest_size=8)
    for value in (run_seed, stream, identity, sample):
        text = str(value).encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest(), "big") & (2**63 - 1)


def check(output: EngineOutput, generation: Generation, what: str, sampled: int = 0) -> None:
    """Raises ResponseError, of the kind Nonsense where the engine is broken, for what must not be trained on or graded.

    Args:
        sampled: tokens that earlier requests sampled of the same response.
    """
    length = len(output.token_ids)
    paused = generation.weight_version is None and was_paused(output)
    if output.finish_reason not in ("stop", "length") and not paused:
        raise Nonsense(f"{what}: the engine ended it: {output.finish_reason} {output.finish_detail}")
    asked = generation.max_response_tokens - sampled
    if not (0 if paused else 1) <= length <= asked:
        raise Nonsense(f"{what}: {length} tokens, asked for 1 to {asked}")
    if output.finish_reason == "length" and length != asked:
        raise ResponseError(f"{what}: cut after {length} of {asked} tokens: the engine's context is too short")
    if len(output.log_probs) != length:
        raise Nonsense(f"{what}: {length} tokens but {len(output.log_probs)} log-probs")
    if length:
        check_tokens(output, generation, what)
    if generation.deterministic and output.retractions:
        raise ResponseError(
            f"{what}: the engine ran out of cache and retracted it {output.retractions} times, which is outside "
            "rollout.deterministic: lower rollout.engine.max_running_requests or raise rollout.engine.max_total_tokens"
        )


def check_tokens(output: EngineOutput, generation: Generation, what: str) -> None:
    """Raises Nonsense where ids, log-probs or weight versions cannot be those of sampled tokens."""
    ids, length = output.token_ids, len(output.token_ids)
    if ids.min() < 0 or ids.max() >= generation.vocab_size:
        raise Nonsense(f"{what}: token id {ids.max()} with a vocabulary of {generation.vocab_size}")
    if not np.isfinite(output.log_probs).all() or output.log_probs.max() > 1e-3:
        raise Nonsense(f"{what}: a log-prob is not finite or above 0")
    if not covers(output.weight_spans, length):
        raise Nonsense(f"{what}: its weight versions {output.weight_spans} do not cover its {length} tokens")
    versions = {span.version for span in output.weight_spans}
    expected = generation.weight_version
    if expected is None and not all(version.isdecimal() for version in versions):
        raise Nonsense(f"{what}: sampled under weights {versions}, which are not optimizer steps")
    if expected is not None and versions != {str(expected)}:
        raise Nonsense(f"{what}: sampled under weights {versions}, expected {expected}")


def check_versions(output: EngineOutput, before: int | None, after: int | None, what: str) -> None:
    """Raises Nonsense where tokens were sampled under other weights than the engine was given.

    Args:
        before, after: weight version of the engine when the request was made and when it was answered; None: not known.
    """
    if before is None or after is None:
        return
    for span in output.weight_spans:
        if not before <= int(span.version) <= after:
            raise Nonsense(f"{what}: sampled under weights {span.version}, the engine was given {before} to {after}")
