"""What a run came to, in a few numbers, and whether it collapsed.

A run collapsed if one of these holds at its end (a run that fell and came back did not):

(a) Its success fell. Success is the accuracy on held-out prompts and the mean reward of rollout batches; one of them is
    enough. Both are smoothed: a running mean over WINDOW points, or over a quarter of the points where there are fewer
    than 4 * WINDOW, and at least one. `start` is the mean of the first half window, before smoothing can hide a fast
    fall; `best` is the largest smoothed value or the start; `end` is the last smoothed value. It fell if best - end is
    more than LOST_SHARE of what was gained (best - start) and more than LEAST_FALL of the scale, so a base that starts
    at 0.4 and reaches 0.9 collapsed below 0.65, and one that learned nothing below about 0.2; or if best - end is more
    than LOST_SHARE of best itself (where nothing is ever negative) and more than NOISE of the scale: 0.3 that became 0.14.
    The scale is 1 for a right-or-wrong reward: twice the largest standard deviation seen, which is what makes the rule
    the same for rewards of -1 and 1. With fewer than 2 points nothing is said.
    LEAST_FALL and NOISE keep noise out: in simulated runs of 40 to 480 batches of 16 prompts with 8 responses, without any
    trend, the rule held in at most 2 of 1,000 (with 12 such batches in 17 of 1,000).
(b) Its entropy ran away: the mean of -log mu, by rollout batch and smoothed in the same way, ends above
    ENTROPY_GROWTH times that of the first batch and above HIGH_ENTROPY nats; or below LOW_ENTROPY nats while success
    falls (a policy that is sure and right has a low entropy too).
(c) Its length ran away: more than CUT_SHARE of responses are cut, or the mean length is above LENGTH_SHARE of
    `rollout.max_response_tokens`, while success falls.

Success falls, in (b) and (c), if best - end is more than FALLING of the scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vespo.observability.run_folder import Rows, RunFolder, column

WINDOW = 8
LOST_SHARE = 0.5
LEAST_FALL = 0.2
NOISE = 0.05
FALLING = 0.1
ENTROPY_GROWTH = 4.0
HIGH_ENTROPY = 0.5
LOW_ENTROPY = 0.01
CUT_SHARE = 0.5
LENGTH_SHARE = 0.9

Points = list[tuple[float, float]]
"""(optimizer step, value), in order of steps, one value a step, all finite."""


def collapse(run: RunFolder) -> str | None:
    """Why a run counts as collapsed, in words, or None. The module's docstring is the definition."""
    courses = _courses(run)
    reasons = [
        f"{course.name} fell from {course.best:.2f} to {course.end:.2f}, having started at {course.start:.2f}"
        for course in courses
        if course.fell
    ]
    falling = any(course.fall > FALLING * course.scale for course in courses)
    reasons += [reason for reason in (_entropy(run, falling), _length(run, falling)) if reason]
    return "; ".join(reasons) or None


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a window of WINDOW values, of a quarter of them if that is fewer, of at least one.

    The first result is the mean of the first window, so there are fewer results than values. Empty for no values.
    """
    window = _window(values)
    return [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]


def final_accuracy(run: RunFolder) -> float | None:
    """Held-out accuracy after training; None for a run that did not come to that evaluation."""
    return _accuracy(run, "after")


def accuracy_before(run: RunFolder) -> float | None:
    """Held-out accuracy before training."""
    return _accuracy(run, "before")


def best_accuracy(run: RunFolder) -> float | None:
    """The largest held-out accuracy of all evaluations, those before and after training included."""
    seen = [accuracy_before(run), final_accuracy(run), *(value for _, value in points(run, "evaluation", "accuracy"))]
    return max((value for value in seen if value is not None), default=None)


def status(run: RunFolder) -> str:
    """ "finished", "failed: ..." as summary.json says it, or "unfinished" where a run did not come to writing one."""
    return "unfinished" if "summary.json" in run.missing else str(run.summary.get("status", "finished"))


def wall_seconds(run: RunFolder) -> float | None:
    """Seconds that a run took. Where there is no summary.json: from its first measurement to its last."""
    if "wall_seconds" in run.summary:
        return _finite(run.summary["wall_seconds"])
    times = [row["timestamp"] for rows in run.rows.values() for row in rows if "timestamp" in row]
    return max(times) - min(times) if times else None


def generated_tokens(run: RunFolder) -> int:
    """Response tokens sampled for training."""
    return int(
        run.summary.get("generated_tokens", sum(value for _, value in points(run, "rollout", "response/tokens")))
    )


def trained_tokens(run: RunFolder) -> int:
    """Tokens in the forward and backward passes of all steps."""
    return int(run.summary.get("trained_tokens", sum(value for _, value in points(run, "step", "tokens/trained"))))


def points(run: RunFolder, kind: str, name: str) -> Points:
    """One measurement of a run over optimizer steps, without what is missing or not finite."""
    return points_of(run.kind(kind), name)


def points_of(rows: Rows, name: str) -> Points:
    """The same of rows."""
    found = zip(column(rows, "step"), column(rows, name), strict=True)
    return sorted({step: y for step, y in found if step is not None and y is not None and math.isfinite(y)}.items())


def batch_means(run: RunFolder, name: str) -> Points:
    """A measurement of steps as its mean over the mini-batches of each rollout batch, at the step that sampled it."""
    batches: dict[int, Points] = {}
    for row in run.kind("step"):
        value = _finite(row.get(name))
        if value is not None and row.get("batch") is not None:
            batches.setdefault(row["batch"], []).append((row["step"] - 1.0, value))
    return sorted((min(steps)[0], sum(value for _, value in steps) / len(steps)) for steps in batches.values())


def stalest_steps(run: RunFolder, name: str) -> Points:
    """A measurement of steps where the data of each rollout batch is stalest: at its last mini-batch. Asynchronous: at
    the stalest of the steps between two weight updates, the last one of several.

    A batch that a run did not finish is left out.
    """
    batches: dict[int, list[dict]] = {}
    for row in run.kind("step"):
        if "mini_batch" in row:
            batches.setdefault(row["batch"], []).append(row)
    last = max((row["mini_batch"] for rows in batches.values() for row in rows), default=None)
    found = {}
    for rows in batches.values():
        if any(row["mini_batch"] == last for row in rows):
            stalest = max(rows, key=lambda row: (row.get("staleness", 0) if run.asynchronous else 0, row["step"]))
            found[float(stalest["step"])] = _finite(stalest.get(name))
    return sorted((step, value) for step, value in found.items() if value is not None)


@dataclass(frozen=True)
class _Course:
    """How a measure of success went. `least`: the smallest value, not smoothed. `scale`: the distance between wrong
    and right, in its units."""

    name: str
    start: float
    best: float
    end: float
    least: float
    scale: float

    @property
    def fall(self) -> float:
        return self.best - self.end

    @property
    def fell(self) -> bool:
        of_gain = max(LOST_SHARE * (self.best - self.start), LEAST_FALL * self.scale)
        of_best = max(LOST_SHARE * self.best, NOISE * self.scale)
        return self.fall > of_gain or (self.least >= 0 and self.fall > of_best)


def _courses(run: RunFolder) -> list[_Course]:
    accuracy = [value for _, value in points(run, "evaluation", "accuracy")]
    rewards = [value for _, value in points(run, "rollout", "reward/mean")]
    spread = max((value for _, value in points(run, "rollout", "reward/std")), default=0.0)
    # The standard deviation of a value that is 1 with probability p, else 0.
    of_accuracy = max((math.sqrt(value * (1 - value)) for value in accuracy), default=0.0)
    courses = []
    for name, values, deviation in (("held-out accuracy", accuracy, of_accuracy), ("reward", rewards, spread)):
        if len(values) >= 2:
            half, means = (_window(values) + 1) // 2, smoothed(values)
            start = sum(values[:half]) / half
            courses.append(_Course(name, start, max(start, *means), means[-1], min(values), 2 * deviation or 1.0))
    return courses


def _entropy(run: RunFolder, falling: bool) -> str | None:
    values = [value for _, value in batch_means(run, "entropy/old_policy")]
    if len(values) < 2:
        return None
    start, end = values[0], smoothed(values)[-1]
    if end > max(ENTROPY_GROWTH * start, HIGH_ENTROPY):
        return f"entropy rose from {start:.2g} to {end:.2g} nats a token"
    if end < LOW_ENTROPY and falling:
        return f"entropy fell from {start:.2g} to {end:.2g} nats a token while success fell"
    return None


def _length(run: RunFolder, falling: bool) -> str | None:
    if not falling:
        return None
    cut = smoothed([value for _, value in points(run, "rollout", "response/truncated_share")])[-1:]
    if cut and cut[0] > CUT_SHARE:
        return f"{cut[0]:.0%} of responses were cut at the length limit while success fell"
    lengths = smoothed([value for _, value in points(run, "rollout", "response/length_mean")])[-1:]
    limit = run.setting("rollout.max_response_tokens")
    if lengths and limit and lengths[0] > LENGTH_SHARE * limit:
        return f"responses grew to {lengths[0]:.0f} of at most {limit} tokens while success fell"
    return None


def _window(values: Sequence[float]) -> int:
    return max(1, min(WINDOW, len(values) // 4))


def _accuracy(run: RunFolder, when: str) -> float | None:
    """From summary.json, or else (a run without one, or one that failed on the way) from the evaluation itself."""
    told = _finite(run.summary.get(f"eval_accuracy_{when}"))
    rows = [row for row in run.kind("evaluation") if row.get("when") == when]
    return told if told is not None or not rows else _finite(rows[-1].get("accuracy"))


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
