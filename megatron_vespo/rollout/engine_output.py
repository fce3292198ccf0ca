"""What an engine sampled for one input."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightSpan:
    """Response tokens [start, end) that were sampled under one weight version."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class EngineOutput:
    """What the engine sampled for one input.

    Attributes:
        token_ids: [response tokens] int32, the stop token included.
        log_probs: [response tokens] float32, natural logarithm, of the distribution with the temperature applied.
        finish_reason: "stop", "length" or "abort".
        finish_detail: the engine's message of an abort, else "".
        finish_status: of HTTP, which the engine gives to an abort that is an error; None for all others.
        cached_tokens: first tokens of the input that were found in the prefix cache.
        retractions: how often the engine ran out of cache and computed the request's tokens again.
        routed_experts: as it came (see `routing.codec`); None where it was not asked for or did not come.
    """

    request_id: str
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    finish_reason: str
    finish_detail: str
    weight_spans: tuple[WeightSpan, ...]
    cached_tokens: int
    retractions: int
    finish_status: int | None = None
    routed_experts: str | None = None


def read_output(item: dict[str, Any]) -> EngineOutput:
    """One response out of the body of /generate."""
    meta = item["meta_info"]
    finish = meta["finish_reason"]
    log_probs = meta["output_token_logprobs"]
    return EngineOutput(
        request_id=meta["id"],
        token_ids=np.array(item["output_ids"], dtype=np.int32),
        log_probs=np.array([entry[0] for entry in log_probs], dtype=np.float32),
        finish_reason=finish["type"],
        finish_detail=str(finish.get("message") or ""),
        weight_spans=tuple(
            WeightSpan(str(span["version"]), span["start"], span["end"]) for span in meta.get("weight_versions") or ()
        ),
        cached_tokens=meta.get("cached_tokens", 0),
        retractions=meta.get("num_retractions") or 0,
        finish_status=finish.get("status_code"),
        routed_experts=meta.get("routed_experts"),
    )
