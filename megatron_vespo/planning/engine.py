"""A simulated engine: requests that share it, a queue, pauses for prompts and for new weights."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf

from megatron_vespo.planning.clock import Clock
from megatron_vespo.planning.rates import EngineRates

ROUNDING = 1e-6
"""Of a token: marks are sums of many small numbers."""


@dataclass(eq=False)
class Request:
    """One response while it is sampled.

    Attributes:
        prefill_tokens: of its prompt that the engine must compute.
        weight_version: of the engine when its first token was sampled.
    """

    group: int
    prompt_tokens: int
    response_tokens: int
    prefill_tokens: int
    weight_version: int | None = None


class SimulatedEngine:
    """Requests that run get one token each from every iteration, so all of them are measured by one count of iterations:
    a request that begins at count m and has n tokens ends at count m + n.

    Attributes:
        tokens: sampled so far.
        busy_seconds: in which it decoded.
    """

    def __init__(self, rates: EngineRates, clock: Clock, finished: Callable[[Request], None]) -> None:
        self.weight_version = 0
        self.tokens = 0.0
        self.busy_seconds = 0.0
        self._rates = rates
        self._clock = clock
        self._finished = finished
        self._running: list[tuple[float, int, Request]] = []
        self._queue: deque[Request] = deque()
        self._submitted = 0
        self._count = 0.0
        self._since = 0.0
        self._stands_still_until = 0.0
        self._plan = 0
        """Number of the latest plan for the next end; older ones in the clock are void."""

    @property
    def outstanding(self) -> int:
        return len(self._running) + len(self._queue)

    def submit(self, requests: list[Request]) -> None:
        self._advance()
        self._queue.extend(requests)
        self._admit()
        self._plan_next()

    def pause(self) -> None:
        self._advance()
        self._stands_still_until = inf
        self._plan_next()

    def resume(self, weight_version: int, *, compute_again: bool) -> None:
        """With new weights. `compute_again`: what ran was aborted, and its prefixes must be computed."""
        self._advance()
        self._stands_still_until = self._clock.now
        self.weight_version = weight_version
        if compute_again:
            self._stands_still_until += self._prefixes() / self._rates.prefill_tokens_per_second
        self._admit()
        self._plan_next()

    def _prefixes(self) -> float:
        """Tokens of what runs, prompts and responses so far."""
        sampled = sum(request.response_tokens - (end - self._count) for end, _, request in self._running)
        prompts = [(request.group, request.prompt_tokens) for _, _, request in self._running]
        shared = set(prompts) if self._rates.prefix_cache else prompts
        return sampled + sum(tokens for _, tokens in shared)

    def _advance(self) -> None:
        now, begun = self._clock.now, max(self._since, self._stands_still_until)
        if self._running and now > begun:
            iterations = (now - begun) / self._rates.decode.seconds(len(self._running))
            self._count += iterations
            self.tokens += iterations * len(self._running)
            self.busy_seconds += now - begun
        self._since = now

    def _admit(self) -> None:
        if self._stands_still_until == inf:
            return
        while self._queue and len(self._running) < self._rates.max_running:
            request = self._queue.popleft()
            request.weight_version = self.weight_version
            self._submitted += 1
            heapq.heappush(self._running, (self._count + request.response_tokens, self._submitted, request))
            begun = max(self._clock.now, self._stands_still_until)
            self._stands_still_until = begun + request.prefill_tokens / self._rates.prefill_tokens_per_second

    def _plan_next(self) -> None:
        self._plan += 1
        if not self._running or self._stands_still_until == inf:
            return
        left = max(0.0, self._running[0][0] - self._count)
        seconds = left * self._rates.decode.seconds(len(self._running))
        self._clock.at(max(self._clock.now, self._stands_still_until) + seconds, partial(self._end, self._plan))

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        ended = []
        while self._running and self._running[0][0] <= self._count + ROUNDING:
            ended.append(heapq.heappop(self._running)[2])
        self._admit()
        self._plan_next()
        for request in ended:
            self._finished(request)
