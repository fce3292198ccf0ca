"""How fast engines sample and trainers train: the numbers that a simulation runs on."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeSpeed:
    """Seconds of one decode iteration with b running requests, each of which gets one token from it.

    Piecewise linear in b through measured points; below the first as at the first, beyond the last on the line through
    the last two. So each of b requests gets 1 / seconds(b) tokens a second, and all of them b / seconds(b).

    Attributes:
        points: (running requests, seconds), requests ascending.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        running = [b for b, _ in self.points]
        if not running or running != sorted(set(running)) or min(s for _, s in self.points) <= 0:
            raise ValueError(f"points of a decode speed: requests ascending, seconds above 0; found {self.points}")

    def seconds(self, running: int) -> float:
        points = self.points
        if running <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = min(bisect_left(points, (running, 0.0)), len(points) - 1)
        (low, at_low), (high, at_high) = points[right - 1], points[right]
        return at_low + (at_high - at_low) * (running - low) / (high - low)


@dataclass(frozen=True)
class EngineRates:
    """Of one engine.

    Attributes:
        max_running: requests at once; the others wait in its queue.
        prefill_tokens_per_second: while it computes prompts it decodes nothing.
        prefix_cache: a group's prompt is computed once, and not again for each of its responses.
    """

    decode: DecodeSpeed
    max_running: int
    prefill_tokens_per_second: float = float("inf")
    prefix_cache: bool = True

    @property
    def full_tokens_per_second(self) -> float:
        return self.max_running / self.decode.seconds(self.max_running)


@dataclass(frozen=True)
class TrainerRates:
    """Of the whole trainer.

    Attributes:
        tokens_per_second: of all replicas, prompt and response tokens, everything of a step included.
        step_seconds: of each step beside that.
        replicas: of the model; a step lasts at least as long as its longest sequence on one of them.
    """

    tokens_per_second: float
    step_seconds: float = 0.0
    replicas: int = 1

    def seconds(self, sequences: Sequence[int]) -> float:
        """Of a step on sequences of so many tokens."""
        of_one = self.tokens_per_second / self.replicas
        return self.step_seconds + max(sum(sequences) / self.tokens_per_second, max(sequences) / of_one)


@dataclass(frozen=True)
class Cluster:
    """What a simulated run has.

    Attributes:
        engines: how many, all alike.
        sync_seconds: from the moment that engines stand still for new weights until they sample again.
        grade_seconds: from the end of a group's last response until the group is complete.
    """

    engines: int
    engine: EngineRates
    trainer: TrainerRates
    sync_seconds: float = 0.0
    grade_seconds: float = 0.0
