"""What the console knows of a run: the phase, the last rows, short histories, and how long the rest will take."""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any

HISTORY = 240
HISTORIES = ("rollout/reward/mean", "rollout/response/length_mean", "step/ess", "step/log_weight/std")


@dataclass
class RunState:
    """Not thread-safe by itself: `RunConsole` locks around it. Times are seconds of `clock`."""

    title: str
    total_steps: int
    steps_per_batch: int
    clock: Callable[[], float]
    step: int = 0
    phase: str = "starting"
    done: float | None = None
    total: float | None = None
    unit: str = ""
    note: str = ""
    ended: str = ""
    """"", or how the run ended: "done", "interrupted", "stopped"."""
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest row of each kind; keys of `step` rows that only some mini-batches have are kept from the last one."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    histories: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=HISTORY)))

    def __post_init__(self) -> None:
        self.started = self.phase_started = self.clock()
        self.stopped_at: float | None = None
        self._evaluating = 0.0
        self._batch_began: float | None = None
        self._batch_step = 0
        self._batch_seconds: deque[float] = deque(maxlen=5)

    @property
    def elapsed(self) -> float:
        return (self.clock() if self.stopped_at is None else self.stopped_at) - self.started

    @property
    def phase_elapsed(self) -> float:
        return (self.clock() if self.stopped_at is None else self.stopped_at) - self.phase_started

    def begin(self, phase: str) -> None:
        self.phase, self.phase_started = phase, self.clock()
        self.done, self.total, self.unit, self.note = None, None, "", ""

    def advance(self, done: float, total: float | None, unit: str, note: str) -> None:
        self.done, self.total, self.unit, self.note = done, total, unit, note

    def finish(self, how: str) -> None:
        self.ended, self.stopped_at = how, self.clock()

    def take(self, row: dict[str, Any]) -> None:
        kind = row["kind"]
        self.last[kind] = {**self.last.get(kind, {}), **row}
        for name in HISTORIES:
            row_kind, key = name.split("/", 1)
            value = row.get(key)
            if row_kind == kind and isinstance(value, (int, float)) and isfinite(value):
                self.histories[name].append(float(value))
        if kind == "evaluation":
            self.evaluations.append(row)
            self._evaluating += row.get("time/evaluate") or 0.0
        if kind == "step":
            self.step = row["step"]
        self._measure_batch(kind)

    def _measure_batch(self, kind: str) -> None:
        """A batch lasts from one weight sync to the next, evaluation apart; without syncs (SFT) from step to step."""
        if kind != "sync" and not (kind == "step" and "sync" not in self.last):
            return
        now = self.clock() - self._evaluating
        if self._batch_began is not None:
            self._batch_seconds.append(now - self._batch_began)
        self._batch_began, self._batch_step = now, self.step

    @property
    def seconds_left(self) -> float | None:
        """From the median of the last batches and the last evaluation's time; None until a batch was measured."""
        if self.ended or not self._batch_seconds or self._batch_began is None:
            return None
        left = (self.total_steps - self._batch_step) / self.steps_per_batch * median(self._batch_seconds)
        if self.evaluations and self.evaluations[-1].get("when") != "after":
            left += self.evaluations[-1].get("time/evaluate") or 0.0
        return max(0.0, left - (self.clock() - self._evaluating - self._batch_began))


def clock_text(seconds: float) -> str:
    """Seconds as "02:13" or "1:02:13"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
