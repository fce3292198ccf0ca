"""What requests ask of an engine: settings of a batch, and from them the parameters of each sample."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import ResponseLengthConfig, RolloutConfig, SamplingConfig
from megatron_vespo.rollout.response_lengths import Ending, drawn_length
from megatron_vespo.rollout.seeds import sample_seed
from megatron_vespo.rollout.segments import Response
from megatron_vespo.routing.routes import RoutingShape

Environment = Callable[[Response], Awaitable[NDArray[np.int32] | None]]


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
        cache_of_version_only: of the engine's prefix cache, use only what such requests under `weight_version` computed.
        routes: what the engine's routes look like; None: they are not asked for.
        response_length: each response gets a length that is drawn from this; None: the model ends it.
        environment: what it says after a turn, as token ids; None: the response ends there. Without one all responses
            have one turn.
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
    cache_of_version_only: bool = False
    routes: RoutingShape | None = None
    response_length: ResponseLengthConfig | None = None
    environment: Environment | None = None

    def __post_init__(self) -> None:
        if self.cache_of_version_only and self.weight_version is None:
            raise ValueError("cache_of_version_only: the weights may change, so there is no version to keep to")

    @classmethod
    def of_rollout(
        cls,
        rollout: RolloutConfig,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        run_seed: int,
        stream: str,
        weight_version: int | None,
        cache_version: int | None,
        routes: RoutingShape | None,
        environment: Environment | None,
    ) -> "Generation":
        """Of responses to train on. Another kind of request is made of it by `replace`."""
        return cls(
            samples=rollout.group_size,
            sampling=rollout.sampling,
            max_response_tokens=rollout.max_response_tokens,
            deterministic=rollout.deterministic,
            concurrent_groups=rollout.concurrent_groups,
            stop_token_ids=tuple(stop_token_ids),
            vocab_size=vocab_size,
            run_seed=run_seed,
            stream=stream,
            weight_version=weight_version,
            cache_version=cache_version,
            routes=routes,
            response_length=rollout.response_length,
            environment=environment,
        )

    @property
    def cache_key(self) -> str | None:
        """Names the part of the engine's prefix cache that requests use; None: the one of all that name none."""
        return f"weights {self.weight_version}" if self.cache_of_version_only else None


def ending_of(generation: Generation, response: Response) -> Ending:
    """How one response may end."""
    limit, lengths = generation.max_response_tokens, generation.response_length
    if lengths is None:
        return Ending(limit, generation.stop_token_ids, "length")
    drawn = drawn_length(lengths, generation.run_seed, response.prompt.identity, response.sample)
    # One that is drawn longer than the limit is cut there, as one that the model did not end before.
    return Ending(min(drawn, limit), (), "stop" if drawn <= limit else "length")


def request_id(generation: Generation, response: Response) -> str:
    first = f"{generation.stream}/{response.prompt.identity}/{response.sample}"
    return first if not response.requests else f"{first}/{response.requests}"


def sampling_params(generation: Generation, response: Response) -> dict[str, Any]:
    """SGLang's parameters of the request that goes on with `response`.

    Without deterministic inference it ignores seeds, so none is sent. With it, a token's noise depends on the seed and
    the token's position in prompt and response, so a response that goes on keeps its seed.
    """
    chosen, ending = generation.sampling, ending_of(generation, response)
    params: dict[str, Any] = {
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "top_k": chosen.top_k,
        "min_p": chosen.min_p,
        "frequency_penalty": chosen.frequency_penalty,
        "presence_penalty": chosen.presence_penalty,
        "repetition_penalty": chosen.repetition_penalty,
        "max_new_tokens": ending.max_tokens - response.num_tokens,
        "stop_token_ids": list(ending.stop_token_ids),
        # Else the engine would stop at the eos ids of the model's config and of its tokenizer too.
        "ignore_eos": generation.response_length is not None,
    }
    if chosen.logit_bias:
        params["logit_bias"] = chosen.logit_bias
    if generation.deterministic:
        params["sampling_seed"] = sample_seed(
            generation.run_seed, generation.stream, response.prompt.identity, response.sample
        )
    return params
