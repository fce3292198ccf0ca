"""A run as a discrete-event simulation, with the admission code of the real asynchronous loop.

What is simulated is who waits for whom: engines whose speed falls with the requests that share them, groups that are
complete with their longest response, steps, weight updates. What is sampled and learned is not.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import partial

from megatron_vespo.admission import Bound, Ledger
from megatron_vespo.planning.clock import Clock
from megatron_vespo.planning.engine import Request, SimulatedEngine
from megatron_vespo.planning.rates import Cluster
from megatron_vespo.planning.workload import Workload


@dataclass(frozen=True)
class Outcome:
    """What a simulated run was like.

    Attributes:
        seconds: from the first request to the end of the last step.
        step_ends: of each step, in seconds.
        staleness: trajectories by optimizer steps between the weights of their first token and those they trained.
        trajectories: sampled; all of them are used.
        response_tokens: of these.
        generation: share of the engines' time in which they decoded.
        generation_speed: tokens sampled as a share of what the engines sample when they are full all the time.
        training: share of the time in which the trainer trained.
        updates_mid_generation: weight updates that met running responses.
    """

    seconds: float
    step_ends: tuple[float, ...]
    staleness: Counter[int]
    trajectories: int
    response_tokens: int
    generation: float
    generation_speed: float
    training: float
    updates_mid_generation: int

    @property
    def trajectories_per_second(self) -> float:
        return self.trajectories / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.response_tokens / self.seconds


def simulate(cluster: Cluster, workload: Workload) -> Outcome:
    """Raises RuntimeError if the run gets stuck: every request ended and no step can be taken."""
    run = (_Synchronous if workload.max_staleness is None else _Asynchronous)(cluster, workload)
    run.begin()
    run.clock.run()
    return run.outcome()


class _Run(ABC):
    """What both loops have: engines, groups in flight, a trainer that takes one step at a time."""

    def __init__(self, cluster: Cluster, workload: Workload) -> None:
        self.cluster, self.workload = cluster, workload
        self.clock = Clock()
        self.engines = [SimulatedEngine(cluster.engine, self.clock, self._finished) for _ in range(cluster.engines)]
        self.complete: dict[int, list[Request]] = {}
        self.running: dict[int, int] = {}
        """Responses that are still sampled, by group."""
        self.step_ends: list[float] = []
        self.staleness: Counter[int] = Counter()
        self.response_tokens = 0
        self.training_seconds = 0.0
        self.updates_mid_generation = 0
        self._ended: dict[int, list[Request]] = {}

    @abstractmethod
    def begin(self) -> None:
        """Start what can start before anything ended."""

    @abstractmethod
    def changed(self) -> None:
        """Something ended: start what can start."""

    def sample(self, group: int) -> None:
        """All its responses on the engine with the fewest."""
        workload, cached = self.workload, self.cluster.engine.prefix_cache
        requests = [
            Request(
                group,
                workload.prompt_tokens,
                workload.response_tokens(group, sample),
                workload.prompt_tokens if sample == 0 or not cached else 0,
            )
            for sample in range(workload.group_size)
        ]
        self.running[group] = len(requests)
        min(self.engines, key=lambda engine: engine.outstanding).submit(requests)

    def train(self, groups: list[int], step: int) -> None:
        requests = [request for group in groups for request in self.complete.pop(group)]
        for request in requests:
            assert request.weight_version is not None
            self.staleness[step - request.weight_version] += 1
            self.response_tokens += request.response_tokens
        tokens = [request.prompt_tokens + request.response_tokens for request in requests]
        seconds = self.cluster.trainer.seconds(tokens)
        self.training_seconds += seconds
        self.clock.after(seconds, self._trained)

    @abstractmethod
    def trained(self) -> None:
        """A step ended."""

    def outcome(self) -> Outcome:
        if len(self.step_ends) < self.workload.steps:
            raise RuntimeError(f"the simulated run is stuck after {len(self.step_ends)} steps")
        seconds = self.step_ends[-1]
        engine, engines = self.cluster.engine, len(self.engines)
        tokens = sum(one.tokens for one in self.engines)
        return Outcome(
            seconds=seconds,
            step_ends=tuple(self.step_ends),
            staleness=self.staleness,
            trajectories=sum(self.staleness.values()),
            response_tokens=self.response_tokens,
            generation=sum(one.busy_seconds for one in self.engines) / (engines * seconds),
            generation_speed=tokens / (engines * engine.full_tokens_per_second * seconds),
            training=self.training_seconds / seconds,
            updates_mid_generation=self.updates_mid_generation,
        )

    def _finished(self, request: Request) -> None:
        group = request.group
        self._ended.setdefault(group, []).append(request)
        self.running[group] -= 1
        if self.running[group] == 0:
            self.clock.after(self.cluster.grade_seconds, partial(self._graded, group))

    def _graded(self, group: int) -> None:
        del self.running[group]
        self.complete[group] = self._ended.pop(group)
        self.changed()

    def _trained(self) -> None:
        self.step_ends.append(self.clock.now)
        self.trained()


class _Synchronous(_Run):
    """A batch is sampled, then trained on, in turns."""

    def begin(self) -> None:
        self._begun = 0
        """Groups that were started in this batch and all before."""
        self._sample_batch()

    def changed(self) -> None:
        self._start()
        if len(self.complete) == self._batch:
            self._step()

    def trained(self) -> None:
        if self.complete:
            self._step()
        elif len(self.step_ends) < self.workload.steps:
            for engine in self.engines:
                engine.pause()
            self.clock.after(self.cluster.sync_seconds, self._synced)

    def _synced(self) -> None:
        for engine in self.engines:
            engine.resume(len(self.step_ends), compute_again=False)
        self._sample_batch()

    def _sample_batch(self) -> None:
        steps = min(self.workload.sync_every, self.workload.steps - len(self.step_ends))
        self._batch = steps * self.workload.groups_per_step
        self._waiting = self._batch
        self._start()

    def _start(self) -> None:
        while self._waiting and len(self.running) < self.workload.concurrent_groups:
            self._waiting -= 1
            self._begun += 1
            self.sample(self._begun - 1)

    def _step(self) -> None:
        self.train(sorted(self.complete)[: self.workload.groups_per_step], len(self.step_ends))


class _Asynchronous(_Run):
    """`orchestration/asynchronous.py` and `orchestration/generator.py`."""

    def begin(self) -> None:
        assert self.workload.max_staleness is not None
        self._ledger = Ledger(Bound(self.workload.max_staleness, self.workload.groups_per_step))
        self._version = 0
        self._training = self._holding = self._syncing = False
        self._start()

    def changed(self) -> None:
        self._start()
        self._step()
        if self._holding and not self._syncing and not self.running:
            self._sync()

    def trained(self) -> None:
        self._training = False
        step = len(self.step_ends)
        if step == self.workload.steps:
            return
        if step % self.workload.sync_every:
            self._step()
            return
        self._holding = True
        if self.workload.update != "wait" or not self.running:
            self._sync()

    def _start(self) -> None:
        if self._holding:
            return
        workload, ledger = self.workload, self._ledger
        used = ledger.step * workload.groups_per_step
        room = min(
            ledger.room(self._version),
            workload.concurrent_groups - len(self.running),
            workload.groups - used - len(ledger.deadlines),
        )
        for _ in range(room):
            self.sample(ledger.start(self._version))

    def _step(self) -> None:
        if self._training or self._holding or self._ledger.step == self.workload.steps:
            return
        chosen = self._ledger.choose(self.complete)
        if chosen is None:
            return
        step = self._ledger.step
        self._ledger.use(chosen)
        self._training = True
        self.train(chosen, step)
        self._start()

    def _sync(self) -> None:
        self._syncing = True
        self.updates_mid_generation += bool(self.running) and self.workload.update != "wait"
        for engine in self.engines:
            engine.pause()
        self.clock.after(self.cluster.sync_seconds, self._synced)

    def _synced(self) -> None:
        self._version = len(self.step_ends)
        for engine in self.engines:
            engine.resume(self._version, compute_again=self.workload.update == "abort")
        self._holding = self._syncing = False
        self._start()
        self._step()
