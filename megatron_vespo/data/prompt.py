"""What a source gives to be answered."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prompt:
    """One question of a task, tokenized once.

    `identity` is unique in a run and stable between runs of the same configuration ("chain_sum/7/123").
    `reference` is handed to the scorer unchanged; it must be picklable.
    """

    identity: str
    text: str
    token_ids: NDArray[np.int32]  # [prompt tokens]
    source: int
    """Index of the prompt's source in `data.sources` followed by `evaluation.sources`."""
    reference: object
