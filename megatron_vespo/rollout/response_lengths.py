"""How a response may end, and lengths drawn from a long-tail distribution for experiments."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from megatron_vespo.config import ResponseLengthConfig
from megatron_vespo.rollout.seeds import sample_seed
from megatron_vespo.rollout.trajectory import FinishReason


@dataclass(frozen=True)
class Ending:
    """How one response may end.

    Attributes:
        max_tokens: it has at most so many.
        stop_token_ids: end it before.
        at_max: what a response of `max_tokens` counts as.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    at_max: FinishReason


def drawn_length(config: ResponseLengthConfig, run_seed: int, identity: str, sample: int) -> int:
    """Tokens of one response, at least 1, before the limit of `rollout.max_response_tokens`.

    Run seed, prompt and sample alone decide it, so a synchronous and an asynchronous run have the same work.
    """
    uniform = (sample_seed(run_seed, "response_length", identity, sample) + 0.5) / 2**63
    # The hash has 63 bits and a float 53: the largest would round to 1, which is no quantile of a normal number.
    normal = NormalDist().inv_cdf(min(uniform, 1 - 2**-53))
    return max(1, round(config.median * math.exp(config.sigma * normal)))
