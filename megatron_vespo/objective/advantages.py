"""From rewards to advantages, within the group of responses to one prompt."""

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import AdvantageConfig


def group_normalised(rewards: NDArray[np.float64], config: AdvantageConfig) -> NDArray[np.float64]:
    """(r - mean) / (std + epsilon) in each group: [groups, G] -> [groups, G].

    A group whose rewards are all equal gets exactly 0. `config.std_ddof` says whether the variance divides by G - 1.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    deviation = rewards.std(axis=1, ddof=config.std_ddof, keepdims=True)
    return centred / (deviation + config.std_epsilon)
