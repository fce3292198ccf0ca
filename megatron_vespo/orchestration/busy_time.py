"""When a part was at work, to tell how long two of them were at once."""

from dataclasses import dataclass, field


@dataclass
class BusyTime:
    """Intervals of time in which something was at work, in the order in which they began."""

    intervals: list[tuple[float, float]] = field(default_factory=list)
    since: float | None = None

    def set(self, busy: bool, now: float) -> None:
        """From `now` on it works, or not. `now` never goes back."""
        if busy and self.since is None:
            self.since = now
        elif not busy and self.since is not None:
            self.intervals.append((self.since, now))
            self.since = None

    def until(self, now: float) -> list[tuple[float, float]]:
        """All intervals; one that goes on ends `now`."""
        return self.intervals if self.since is None else [*self.intervals, (self.since, now)]


def seconds_of_both(ones: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """How long both were at work. Neither list's intervals overlap."""
    total, first, second = 0.0, 0, 0
    while first < len(ones) and second < len(others):
        start = max(ones[first][0], others[second][0])
        end = min(ones[first][1], others[second][1])
        total += max(0.0, end - start)
        if ones[first][1] < others[second][1]:
            first += 1
        else:
            second += 1
    return total
