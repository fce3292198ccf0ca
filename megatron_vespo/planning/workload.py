"""What a simulated run does: its loop, its sizes, its lengths."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

LengthOf = Callable[[int, int], int]
"""(group, sample) -> response tokens."""


@dataclass(frozen=True)
class Workload:
    """Settings of a run as the configuration names them.

    Attributes:
        max_staleness: S; None: the synchronous loop, where each batch of K steps is sampled, then trained on.
        concurrent_groups: in flight at once, over all engines.
        response_tokens: of each sample; asked once for each.
    """

    steps: int
    groups_per_step: int
    group_size: int
    sync_every: int
    max_staleness: int | None
    concurrent_groups: int
    prompt_tokens: int
    response_tokens: LengthOf
    update: Literal["abort", "in_place", "wait"] = "abort"

    @property
    def groups(self) -> int:
        return self.steps * self.groups_per_step


def lognormal_lengths(median: float, sigma: float, longest: int, seed: int) -> LengthOf:
    """As `rollout.response_length` draws them: at least 1 token, cut at `longest`."""

    def length(group: int, sample: int) -> int:
        drawn = Random(f"{seed}/{group}/{sample}").lognormvariate(math.log(median), sigma)
        return max(1, min(longest, round(drawn)))

    return length
