"""Kills and stops trainer processes of a run in this process at known calls."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from megatron_vespo.orchestration.policy_group import PolicyGroup

SHORTENED_SECONDS = 5.0


@dataclass
class Faults:
    """Signals for ranks, by (what the driver calls, how often it has called that): (rank, signal)."""

    planned: dict[tuple[str, int], tuple[int, signal.Signals]]
    also: Callable[[str, PolicyGroup], tuple[int, signal.Signals] | None] = lambda what, policy: None
    """Asked at each call, too."""
    calls: Counter[str] = field(default_factory=Counter)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        on_all = PolicyGroup.on_all

        async def sometimes_hit(policy, what, call, seconds=None):
            self.calls[what] += 1
            hit = self.planned.pop((what, self.calls[what]), None) or self.also(what, policy)
            if hit is None:
                return await on_all(policy, what, call, seconds)
            rank, number = hit
            pid = await policy.ranks[rank].__ray_call__.remote(lambda _: os.getpid())
            if number == signal.SIGSTOP:  # a busy machine may take longer for its step; then it is lost as well
                seconds = SHORTENED_SECONDS
            calling = asyncio.ensure_future(on_all(policy, what, call, seconds))
            await asyncio.sleep(0)  # the ranks are called
            os.kill(pid, number)
            return await calling

        patch.setattr(PolicyGroup, "on_all", sometimes_hit)
