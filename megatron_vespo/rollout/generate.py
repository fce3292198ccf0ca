"""Groups of responses from an engine: one request a group, each sample with a seed of its own."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vespo.config import ConfigError, ResponseLengthConfig, RolloutConfig, SamplingConfig
from megatron_vespo.errors import RunError
from megatron_vespo.rollout.client import EngineClient, EngineOutput
from megatron_vespo.rollout.response_lengths import Ending, drawn_length
from megatron_vespo.rollout.seeds import sample_seed
from megatron_vespo.rollout.segments import Response, covers, was_paused
from megatron_vespo.rollout.trajectory import Group, Prompt, Trajectory
from megatron_vespo.routing.routes import RoutingShape

MAX_FRUITLESS_REQUESTS = 100
"""In a row, of one response: a pause that finds it waiting each time would be bad luck, but this is something else."""


class ResponseError(RunError):
    """The engine returned something that cannot have been sampled as asked."""


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
        response_length: each response gets a length that is drawn from this; None: the model ends it.
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
    response_length: ResponseLengthConfig | None = None


def generate_groups(
    client: EngineClient,
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
        EngineError: the engine refused a request, or did not answer.
        ResponseError: a response that is not what was asked for (see `check`).
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
        response_length=rollout.response_length,
    )
    return generate(client, prompts, generation)


def generate_responses(
    client: EngineClient,
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
    routes are recorded, and no lengths are drawn.

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
    return generate(client, prompts, generation)


async def generate(client: EngineClient, prompts: Sequence[Prompt], generation: Generation) -> AsyncIterator[Group]:
    """At most `concurrent_groups` requests at once. When a request fails, or the caller stops, the others are dropped."""
    waiting = deque(prompts)
    running: set[asyncio.Task[Group]] = set()
    try:
        while waiting or running:
            while waiting and len(running) < generation.concurrent_groups:
                running.add(asyncio.create_task(generate_group(client, waiting.popleft(), generation)))
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                group = task.result()
                running.discard(task)
                yield group
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def generate_group(client: EngineClient, prompt: Prompt, generation: Generation) -> Group:
    """All responses to one prompt."""
    token_ids = prompt.token_ids.tolist()
    # An id beyond the embedding would not be refused by the engine: it would kill it.
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= generation.vocab_size:
        raise ConfigError(
            f"prompt {prompt.identity}: its token ids are not all within the model's vocabulary of "
            f"{generation.vocab_size}: the tokenizer does not belong to this model"
        )
    samples = range(generation.samples)
    outputs = await client.generate(
        [token_ids] * generation.samples,
        [sampling_params(generation, prompt.identity, sample) for sample in samples],
        [request_id(generation, prompt.identity, sample) for sample in samples],
        return_routed_experts=generation.routes is not None,
    )
    trajectories = await all_or_none(
        [complete(client, generation, Response(prompt, sample), outputs[sample]) for sample in samples]
    )
    return Group(prompt, trajectories)


async def complete(
    client: EngineClient, generation: Generation, response: Response, output: EngineOutput
) -> Trajectory:
    """The whole of a response of which `output` is the first part: as often as it is aborted, a new request goes on.

    The engine holds that request for as long as it is paused.
    """
    identity, sample = response.prompt.identity, response.sample
    ending = ending_of(generation, identity, sample)
    while True:
        left = ending.max_tokens - response.num_tokens
        check(output, generation, f"response {sample} to prompt {identity}", left)
        await response.add(output, generation.routes, generation.cache_version)
        finish = response.finish_reason(ending)
        if finish is not None:
            return response.trajectory(finish)
        if response.fruitless >= MAX_FRUITLESS_REQUESTS:
            raise ResponseError(
                f"response {sample} to prompt {identity}: aborted {response.fruitless} times before its next token: "
                f"{output.finish_detail}"
            )
        (output,) = await client.generate(
            [response.input_ids],
            [sampling_params(generation, identity, sample, response.num_tokens)],
            [f"{request_id(generation, identity, sample)}/{response.requests}"],
            return_routed_experts=generation.routes is not None,
            routed_experts_start_len=response.first_position,
        )


async def all_or_none(work: Sequence[Coroutine[Any, Any, Trajectory]]) -> list[Trajectory]:
    """When one fails, the others are dropped."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def ending_of(generation: Generation, identity: str, sample: int) -> Ending:
    """How one response may end."""
    limit, lengths = generation.max_response_tokens, generation.response_length
    if lengths is None:
        return Ending(limit, generation.stop_token_ids, "length")
    drawn = drawn_length(lengths, generation.run_seed, identity, sample)
    # One that is drawn longer than the limit is cut there, as one that the model did not end before.
    return Ending(min(drawn, limit), (), "stop" if drawn <= limit else "length")


def request_id(generation: Generation, identity: str, sample: int) -> str:
    return f"{generation.stream}/{identity}/{sample}"


def sampling_params(generation: Generation, identity: str, sample: int, sampled: int = 0) -> dict[str, Any]:
    """SGLang's parameters of one sample that has `sampled` tokens already.

    Without deterministic inference it ignores seeds, so none is sent. With it, a token's noise depends on the seed and
    the token's position in prompt and response, so a response that goes on keeps its seed.
    """
    chosen, ending = generation.sampling, ending_of(generation, identity, sample)
    params: dict[str, Any] = {
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "top_k": chosen.top_k,
        "min_p": chosen.min_p,
        "frequency_penalty": chosen.frequency_penalty,
        "presence_penalty": chosen.presence_penalty,
        "repetition_penalty": chosen.repetition_penalty,
        "max_new_tokens": ending.max_tokens - sampled,
        "stop_token_ids": list(ending.stop_token_ids),
        # Else the engine would stop at the eos ids of the model's config and of its tokenizer too.
        "ignore_eos": generation.response_length is not None,
    }
    if chosen.logit_bias:
        params["logit_bias"] = chosen.logit_bias
    if generation.deterministic:
        params["sampling_seed"] = sample_seed(generation.run_seed, generation.stream, identity, sample)
    return params


def check(output: EngineOutput, generation: Generation, what: str, asked: int) -> None:
    """Raises ResponseError for a response that must not be trained on or graded.

    Args:
        asked: tokens that it was allowed to have; those that earlier requests sampled of the same response are not
            among them.
    """
    length = len(output.token_ids)
    paused = generation.weight_version is None and was_paused(output)
    if output.finish_reason not in ("stop", "length") and not paused:
        raise ResponseError(f"{what}: the engine ended it: {output.finish_reason} {output.finish_detail}")
    if not (0 if paused else 1) <= length <= asked:
        raise ResponseError(f"{what}: {length} tokens, asked for 1 to {asked}")
    if output.finish_reason == "length" and length != asked:
        raise ResponseError(f"{what}: cut after {length} of {asked} tokens: the engine's context is too short")
    if output.finish_reason == "stop" and generation.response_length is not None:
        raise ResponseError(
            f"{what}: the engine ended it after {length} of {asked} tokens, though told to ignore stops"
        )
    if len(output.log_probs) != length:
        raise ResponseError(f"{what}: {length} tokens but {len(output.log_probs)} log-probs")
    if length:
        check_tokens(output, generation, what)
    if generation.deterministic and output.retractions:
        raise ResponseError(
            f"{what}: the engine ran out of cache and retracted it {output.retractions} times, which is outside "
            "rollout.deterministic: lower rollout.engine.max_running_requests or raise rollout.engine.max_total_tokens"
        )


def check_tokens(output: EngineOutput, generation: Generation, what: str) -> None:
    """Raises ResponseError where ids, log-probs or weight versions cannot be those of sampled tokens."""
    ids, length = output.token_ids, len(output.token_ids)
    if ids.min() < 0 or ids.max() >= generation.vocab_size:
        raise ResponseError(f"{what}: token id {ids.max()} with a vocabulary of {generation.vocab_size}")
    if not np.isfinite(output.log_probs).all() or output.log_probs.max() > 1e-3:
        raise ResponseError(f"{what}: a log-prob is not finite or above 0")
    if not covers(output.weight_spans, length):
        raise ResponseError(f"{what}: its weight versions {output.weight_spans} do not cover its {length} tokens")
    versions = {span.version for span in output.weight_spans}
    expected = generation.weight_version
    if expected is None and not all(version.isdecimal() for version in versions):
        raise ResponseError(f"{what}: sampled under weights {versions}, which are not optimizer steps")
    if expected is not None and versions != {str(expected)}:
        raise ResponseError(f"{what}: sampled under weights {versions}, expected {expected}")
