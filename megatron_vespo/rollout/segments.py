"""A response out of the parts that one or several requests sampled: its tokens, its segments, its routes.

A request that is aborted for a weight update keeps what it sampled, and the response goes on in another request, whose
input is the prompt and all tokens so far. The routes of position i decide token i + 1 and belong to the request that
sampled token i + 1. So the last token of an aborted part has its routes from the part that goes on, and the parts'
positions together are those of prompt and response but for the last token, each once. The prompt belongs to the first.
"""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_vespo.rollout.engine_output import EngineOutput, WeightSpan
from megatron_vespo.rollout.response_lengths import Ending
from megatron_vespo.rollout.trajectory import FinishReason, Prompt, Segment, Trajectory
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
        routes: of the positions that belong to this part; None where none are recorded.
    """

    output: EngineOutput
    routes: Routes | None


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

    @property
    def name(self) -> str:
        """In messages."""
        return f"response {self.sample} to prompt {self.prompt.identity}"

    @property
    def num_tokens(self) -> int:
        return sum(len(part.output.token_ids) for part in self.parts)

    @property
    def input_ids(self) -> list[int]:
        """Of the next request."""
        return [*self.prompt.token_ids.tolist(), *(i for part in self.parts for i in part.output.token_ids.tolist())]

    @property
    def first_position(self) -> int:
        """Whose routes belong to the next request, and all after it."""
        return len(self.prompt.token_ids) + self.num_tokens - 1 if self.parts else 0

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
        self.parts.append(Part(replace(output, routed_experts=None), routes))

    def finish_reason(self, ending: Ending) -> FinishReason | None:
        """How the response ended; None: it was aborted and must go on."""
        if not self.parts:
            return None
        output = self.parts[-1].output
        if output.finish_reason != "abort":
            return "stop" if output.finish_reason == "stop" else ending.at_max
        # The engine lets an abort come before any other end of the same token.
        if output.token_ids[-1] in ending.stop_token_ids:
            return "stop"
        return ending.at_max if self.num_tokens >= ending.max_tokens else None

    def trajectory(self, finish_reason: FinishReason) -> Trajectory:
        outputs = [part.output for part in self.parts]
        segments = []
        for output in outputs:
            start = segments[-1].end if segments else 0
            segments += [
                Segment(start + span.start, start + span.end, int(span.version), output.request_id)
                for span in output.weight_spans
            ]
        routes = [part.routes for part in self.parts if part.routes is not None]
        return Trajectory(
            prompt=self.prompt,
            sample=self.sample,
            response_ids=np.concatenate([output.token_ids for output in outputs]),
            behavior_log_probs=np.concatenate([output.log_probs for output in outputs]),
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
