"""Soft punishment of responses near the length limit (DAPO, arXiv 2503.14476, equation 13)."""

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import OverlongShaping


def overlong_penalty(
    response_tokens: NDArray[np.int64], max_response_tokens: int, config: OverlongShaping
) -> NDArray[np.float64]:
    """What to take off each reward: [n] -> [n].

    0 up to max_response_tokens - buffer_tokens, then rising linearly to `penalty` at max_response_tokens.
    """
    past = np.asarray(response_tokens, dtype=np.float64) - (max_response_tokens - config.buffer_tokens)
    return config.penalty * np.clip(past / config.buffer_tokens, 0.0, 1.0)
