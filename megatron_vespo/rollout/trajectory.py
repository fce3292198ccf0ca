"""What is known of one sampled response. The form in which rollouts travel to rewards and training."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.routing.routes import Routes

FinishReason = Literal["stop", "length"]


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


@dataclass(frozen=True)
class Segment:
    """A span [start, end) of response tokens sampled under one weight version by one request."""

    start: int
    end: int
    weight_version: int
    request_id: str


@dataclass
class Trajectory:
    """A prompt, a response as the engine sampled it, and everything known of its sampling.

    Attributes:
        response_ids: [response tokens] int32, the stop token included.
        behavior_log_probs: [response tokens] float32, log-probs of the engine's sampling distribution
            (temperature applied), natural logarithm; 0 where the engine sampled nothing.
        proximal_log_probs: [response tokens] float32, the trainer's at the start of the rollout batch; None unless the
            algorithm asks for them.
        reference_log_probs: [response tokens] float32, of the frozen model of a KL term; None without one.
        engine_log_weights: [response tokens] float32, log of the correction of the engine's error; None without one.
        engine_routes: the experts that the engine chose at each of the P + R - 1 positions; None if it was not asked.
        proximal_routes: those that the trainer chose at the start of the rollout batch; None unless R2 needs them.
        sampled: [response tokens] bool, False on what an environment said between two turns. Those tokens are context
            only: they have no log-prob and no part in any weight, loss or figure. None given: all are sampled.
        segments: cover the response without gap or overlap. What an environment said belongs to the turn that answers.
        sample: position in the group, 0 .. group_size - 1.
    """

    prompt: Prompt
    sample: int
    response_ids: NDArray[np.int32]
    behavior_log_probs: NDArray[np.float32]
    segments: list[Segment]
    finish_reason: FinishReason
    sampled: NDArray[np.bool_] = field(default=None)  # pyright: ignore[reportAssignmentType]
    text: str = ""
    reward: float = float("nan")
    outcome: str = ""
    """How grading ended: "graded", "exception", "timeout", "crash" or "not_finite"."""
    trained: bool = True
    """False: its tokens are masked out of the loss (a truncated response under `truncated: mask`)."""
    advantage: float = float("nan")
    proximal_log_probs: NDArray[np.float32] | None = None
    reference_log_probs: NDArray[np.float32] | None = None
    engine_log_weights: NDArray[np.float32] | None = None
    engine_routes: Routes | None = None
    proximal_routes: Routes | None = None

    def __post_init__(self) -> None:
        if self.sampled is None:
            self.sampled = np.ones(len(self.response_ids), dtype=np.bool_)

    def log_probs_of(self, policy: Literal["behavior", "proximal", "reference"]) -> NDArray[np.float32]:
        """[response tokens]. Raises ValueError if that policy has not scored this trajectory."""
        found = {
            "behavior": self.behavior_log_probs,
            "proximal": self.proximal_log_probs,
            "reference": self.reference_log_probs,
        }[policy]
        if found is None:
            raise ValueError(f"{self.prompt.identity}, sample {self.sample}: no {policy} log-probs")
        return found

    def routes_of(self, replay: Literal["R2", "R3"]) -> Routes | None:
        """What that replay uses: None where nothing was recorded."""
        return self.proximal_routes if replay == "R2" else self.engine_routes

    @property
    def sampled_tokens(self) -> int:
        """How many of the response's tokens the engine sampled."""
        return int(np.count_nonzero(self.sampled))

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def oldest_weight_version(self) -> int:
        return min(segment.weight_version for segment in self.segments)


@dataclass
class Group:
    """The responses to one prompt, in the order of `sample`."""

    prompt: Prompt
    trajectories: list[Trajectory] = field(default_factory=list)
    trained: bool = True
    """False: left out of its step (`zero_variance_groups: filter`)."""


def fingerprint(groups: list[Group]) -> str:
    """16 hexadecimal digits over every prompt, sampled token, log-prob and reward, in order; for bitwise comparison."""
    digest = hashlib.blake2b(digest_size=8)
    for trajectory in (t for group in groups for t in group.trajectories):
        digest.update(trajectory.prompt.identity.encode())
        digest.update(trajectory.prompt.token_ids.tobytes())
        digest.update(trajectory.response_ids.tobytes())
        digest.update(trajectory.behavior_log_probs.tobytes())
        digest.update(np.float64(trajectory.reward).tobytes())
    return digest.hexdigest()
