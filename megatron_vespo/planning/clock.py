"""Time of a discrete-event simulation."""

import heapq
from collections.abc import Callable


class Clock:
    """Calls what is due, in the order of time and, at one time, in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, time: float, call: Callable[[], None]) -> None:
        """`time` in seconds, not before now."""
        self._asked += 1
        heapq.heappush(self._due, (time, self._asked, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now, _, call = heapq.heappop(self._due)
            call()
