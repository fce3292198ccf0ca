"""A response out of the parts that one or several requests sampled: its tokens, its segments, its routes.

A request that is aborted for a weight update keeps what it sampled, and the response goes on in another request, whose
input is the prompt and all tokens so far. The routes of position i decide token i + 1 and belong to the request that
sampled token i + 1. So the last token of an aborted part has its routes from the part that goes on, and the parts'
positions together are those of prompt and response but for the last token, each once. The prompt belongs to the first.

Between two turns an environment may say something: its tokens are input of the next request, and belong to the part that
that request adds. The engine's own tokens stay as they were sampled; nothing is encoded again.
"""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rollout.engine_output import EngineOutput, WeightSpan
from megatron_vespo.rollout.response_lengths import Ending
from megatron_vespo.rollout.trajectory import FinishReason, Segment, Trajectory
from megatron_vespo.routing.codec import RoutesError, decode
from megatron_vespo.routing.routes import Routes, RoutingShape, joined, masked_routes, recorded_routes

PAUSED = ("Aborted", "Abort in waiting queue")
"""What SGLang says, without a status, of a running and of a waiting request that was aborted on purpose. Its errors have
a status and messages of their own."""
LARGE_PAYLOAD = 2**18
"""Characters from which routes are decoded in a thread, so that other requests go on."""


@dataclass(frozen=True)
class Part:
    """What one request added: at least one token.

    Attributes:
        observed: [tokens] int32, what an environment said before the tokens that were sampled.
        routes: of the positions that belong to this part; None where none are recorded.
    """

    output: EngineOutput
    routes: Routes | None
    observed: NDArray[np.int32]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        return np.concatenate([self.observed, self.output.token_ids])


NOTHING = np.zeros(0, dtype=np.int32)


@dataclass
class Response:
    """One response while it is sampled."""

    prompt: Prompt
    sample: int
    parts: list[Part] = field(default_factory=list)
    requests: int = 0
    """Answered so far, those that were aborted before their first token included."""
    fruitless: int = 0
    """Of those, the last ones that were aborted before their first token."""
    observed: NDArray[np.int32] = field(default_factory=lambda: NOTHING)
    """What an environment said since the last part."""
    turns: int = 1
    """That the model has taken, or is in."""

    @property
    def name(self) -> str:
        """In messages."""
        return f"response {self.sample} to prompt {self.prompt.identity}"

    @property
    def num_tokens(self) -> int:
        """So far, those of an environment included."""
        return self._tokens_of_parts + len(self.observed)

    @property
    def _tokens_of_parts(self) -> int:
        return sum(len(part.observed) + len(part.output.token_ids) for part in self.parts)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[tokens so far] int32."""
        return np.concatenate([*(part.token_ids for part in self.parts), self.observed])

    @property
    def input_ids(self) -> list[int]:
        """Of the next request."""
        return [*self.prompt.token_ids.tolist(), *self.token_ids.tolist()]

    @property
    def first_position(self) -> int:
        """Whose routes belong to the next request, and all after it."""
        return len(self.prompt.token_ids) + self._tokens_of_parts - 1 if self.parts else 0

    def observe(self, token_ids: NDArray[np.int32]) -> None:
        """An environment said this after a turn; the next request begins another one."""
        self.observed = np.concatenate([self.observed, token_ids])
        self.turns += 1

    async def add(self, output: EngineOutput, shape: RoutingShape | None, cache_version: int | None) -> None:
        """Keep what a request sampled. `shape`: of the routes that it was asked for."""
        self.requests += 1
        tokens = len(output.token_ids)
        self.fruitless = 0 if tokens else self.fruitless + 1
        if not tokens:
            return
        routes = None
        if shape is not None:
            end = len(self.prompt.token_ids) + self.num_tokens + tokens - 1
            routes = await part_routes(output, shape, self.first_position, end, cache_version)
        # The engine's string is more than five times as large as what was read from it.
        self.parts.append(Part(replace(output, routed_experts=None), routes, self.observed))
        self.observed = NOTHING

    def finish_reason(self, ending: Ending) -> FinishReason | None:
        """How the response ended; None: it was aborted and must go on."""
        if not self.parts or len(self.observed):
            return None
        output = self.parts[-1].output
        if output.finish_reason != "abort":
            return "stop" if output.finish_reason == "stop" else ending.at_max
        # The engine lets an abort come before any other end of the same token.
        if output.token_ids[-1] in ending.stop_token_ids:
            return "stop"
        return ending.at_max if self.num_tokens >= ending.max_tokens else None

    def trajectory(self, finish_reason: FinishReason) -> Trajectory:
        segments: list[Segment] = []
        for part in self.parts:
            first = segments[-1].end if segments else 0
            start = first + len(part.observed)
            for span in part.output.weight_spans:
                begin = start + span.start if span.start else first
                segments.append(Segment(begin, start + span.end, int(span.version), part.output.request_id))
        routes = [part.routes for part in self.parts if part.routes is not None]
        sampled = [np.arange(len(part.token_ids)) >= len(part.observed) for part in self.parts]
        log_probs = [
            np.concatenate([np.zeros(len(part.observed), np.float32), part.output.log_probs]) for part in self.parts
        ]
        return Trajectory(
            prompt=self.prompt,
            sample=self.sample,
            response_ids=np.concatenate([part.token_ids for part in self.parts]),
            behavior_log_probs=np.concatenate(log_probs),
            sampled=np.concatenate(sampled),
            segments=segments,
            finish_reason=finish_reason,
            engine_routes=joined(routes) if routes else None,
        )


def was_paused(output: EngineOutput) -> bool:
    """Aborted so that it can go on, not for an error."""
    return output.finish_reason == "abort" and output.finish_status is None and output.finish_detail in PAUSED


async def part_routes(
    output: EngineOutput, shape: RoutingShape, start: int, end: int, cache_version: int | None
) -> Routes:
    """Routes of positions [start, end), as far as they can be trusted to be those of the tokens that were sampled.

    Args:
        cache_version: oldest weights that may have computed what the engine's prefix cache holds; None: none older than
            the request's own.

    Returns:
        Routes with `masked` by reason: a kind of `RoutesError`, or
            "missing": the engine returned none;
            "retracted": the engine threw its work away and computed all again, perhaps under other weights;
            "mixed_versions": weights changed while the request ran: the engine returns one routing for each position,
            and does not say under which weights;
            "older_cache": from a prefix that may have been computed under older weights.
    """
    routes = await _readable_routes(output, shape, start, end, cache_version)
    return replace(routes, wire_bytes=len(output.routed_experts or ""))


async def _readable_routes(
    output: EngineOutput, shape: RoutingShape, start: int, end: int, cache_version: int | None
) -> Routes:
    rows = end - start
    versions = {span.version for span in output.weight_spans}
    if output.retractions:
        return masked_routes(rows, shape, "retracted")
    if len(versions) > 1:
        return masked_routes(rows, shape, "mixed_versions")
    if not output.routed_experts:
        return masked_routes(rows, shape, "missing")
    expected = {"rows": rows, "moe_layers": shape.moe_layers, "topk": shape.topk, "num_experts": shape.num_experts}
    try:
        if len(output.routed_experts) > LARGE_PAYLOAD:
            experts = await asyncio.to_thread(decode, output.routed_experts, **expected)
        else:
            experts = decode(output.routed_experts, **expected)
    except RoutesError as error:
        return masked_routes(rows, shape, error.kind)
    (version,) = map(int, versions)
    routes = recorded_routes(experts, version)
    cached = min(rows, max(0, output.cached_tokens - start))
    if cache_version is None or cache_version >= version or not cached:
        return routes
    positions = np.arange(rows)
    chosen_under = np.where(positions < cached, cache_version, version).astype(np.int32)
    return Routes(experts, positions >= cached, chosen_under, {"older_cache": cached})


def covers(spans: tuple[WeightSpan, ...], length: int) -> bool:
    """Whether spans follow each other without gap or overlap from 0 to `length`."""
    return [s.start for s in spans] == [0, *(s.end for s in spans[:-1])] and spans[-1].end == length
