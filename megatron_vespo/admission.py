"""Bounded staleness by admission: a group is started only if it can still be used in time; nothing is dropped for age.

Pure, and without clocks: the asynchronous loop and the simulation of large clusters run the same code.

A group that was started under weight version v may be used at optimizer steps up to v + S, counted from 0, since before
step t the trainer's weights are those after t steps. That is its deadline. Each step uses P groups. So the groups that
are started and not yet used can all be used in time if, for every step d, at most P * (d - t + 1) of them have a deadline
up to d, where t is the next step. New groups have the latest deadline of all, so they are admitted by one comparison;
and a step may only be taken on groups whose absence leaves the others enough room.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bound:
    """Settings of a run.

    Attributes:
        max_staleness: S, in optimizer steps.
        groups_per_step: P.
    """

    max_staleness: int
    groups_per_step: int

    def __post_init__(self):
        if self.max_staleness < 0 or self.groups_per_step < 1:
            raise ValueError(f"{self}: max_staleness is at least 0 and groups_per_step at least 1")


@dataclass
class Ledger:
    """Every group that was started and not yet used, with its deadline.

    Attributes:
        step: the next optimizer step, t.
        deadlines: of the groups, by their numbers; a number is never used twice.
    """

    bound: Bound
    step: int = 0
    deadlines: dict[int, int] = field(default_factory=dict)
    started: int = 0
    """Groups so far, and the number of the next one."""

    def room(self, weight_version: int) -> int:
        """How many groups may be started now, under the engine's `weight_version`."""
        steps_left = weight_version + self.bound.max_staleness - self.step + 1
        return max(0, self.bound.groups_per_step * steps_left - len(self.deadlines))

    def start(self, weight_version: int) -> int:
        """Admit a group. Returns its number.

        Raises:
            ValueError: there is no room for it.
        """
        if self.room(weight_version) < 1:
            raise ValueError(
                f"step {self.step}: no group can be started under weights {weight_version} and used in time"
            )
        number = self.started
        self.started += 1
        self.deadlines[number] = weight_version + self.bound.max_staleness
        return number

    def restore(self, weight_version: int) -> int:
        """A group of the run that this one goes on with, whose oldest token was sampled under `weight_version`."""
        number = self.started
        self.started += 1
        self.deadlines[number] = weight_version + self.bound.max_staleness
        return number

    def leave_out(self, number: int) -> None:
        """A group that will not be used: without variance, or a failure. What it held is free again."""
        del self.deadlines[number]

    def choose(self, complete: Iterable[int]) -> list[int] | None:
        """The groups of the next step out of those that are complete; None: wait for more.

        Those with the earliest deadlines come first, in the order in which they were started. None also where enough
        are complete, but a step on them would leave others, which are still sampled, too late.
        """
        ready = sorted(complete, key=lambda number: (self.deadlines[number], number))
        chosen = ready[: self.bound.groups_per_step]
        if len(chosen) < self.bound.groups_per_step:
            return None
        left = self.deadlines.keys() - set(chosen)
        return chosen if self._in_time(left, self.step + 1) else None

    def use(self, chosen: Sequence[int]) -> None:
        """The next step is taken on these.

        Raises:
            ValueError: one of them is too old, or others would become so.
        """
        late = [number for number in chosen if self.deadlines[number] < self.step]
        left = self.deadlines.keys() - set(chosen)
        if late or not self._in_time(left, self.step + 1):
            raise ValueError(f"step {self.step}: groups {late or sorted(left)} are beyond the bound {self.bound}")
        for number in chosen:
            del self.deadlines[number]
        self.step += 1

    def waited_for(self, complete: Iterable[int]) -> list[int]:
        """What the next step needs that is not complete: the earliest of the others."""
        missing = self.deadlines.keys() - set(complete)
        return sorted(missing, key=lambda number: (self.deadlines[number], number))[: self.bound.groups_per_step]

    def _in_time(self, numbers: Iterable[int], step: int) -> bool:
        """Whether all of them can be used from `step` on."""
        counted = Counter(self.deadlines[number] for number in numbers)
        so_far = 0
        for deadline in sorted(counted):
            so_far += counted[deadline]
            if so_far > self.bound.groups_per_step * (deadline - step + 1):
                return False
        return True
