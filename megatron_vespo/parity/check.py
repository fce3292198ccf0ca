"""Run layouts on real ranks, one after the other, and compare each with one process."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.architecture.layout_fit import require_fit
from megatron_vespo.config import ConfigError
from megatron_vespo.parity import worker
from megatron_vespo.parity.case import Case
from megatron_vespo.parity.compare import Comparison, Place, Run, assemble, compare
from megatron_vespo.parity.layouts import LayoutCase, parse_layout
from megatron_vespo.parity.pool import RankFailed, RankPool
from megatron_vespo.parity.worker import PlantedError

ONE_PROCESS = "dp=1,tokens=1000"
"""What all are compared with: one rank, one micro-batch a step."""


@dataclass(frozen=True)
class Finding:
    """What came of one layout: a comparison, or why there is none (`error`)."""

    layout: LayoutCase
    seconds: float
    comparison: Comparison | None = None
    error: str | None = None

    @property
    def verdict(self) -> str:
        return self.comparison.verdict if self.comparison else "ERROR"

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.name,
            "ranks": self.layout.policy.ranks,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 2),
            "comparison": self.comparison and self.comparison.as_json(),
            "error": self.error,
        }


class ParityCheck:
    """One case, and the single process's run of it."""

    def __init__(self, pool: RankPool, case: Case):
        self._pool = pool
        one = parse_layout(ONE_PROCESS).policy
        self._case = case.with_old_log_probs(pool.run(1, worker.score, case, one)[0])
        self._recorded = recorded_places(case)
        self._start: dict[str, Tensor] = load_file(case.folder / "model.safetensors")
        self._one: Run = assemble(pool.run(1, worker.train, self._case, one, "none"))

    def findings(self, layouts: list[LayoutCase], planted: PlantedError = "none") -> Iterator[Finding]:
        """Of each layout as it is done.

        Raises:
            ConfigError: before the first runs, if any does not fit the model.
        """
        for layout in layouts:
            try:
                require_fit(self._case.architecture, layout.policy)
            except ConfigError as error:
                raise ConfigError(f"{layout.name}: {error}") from None
        for layout in layouts:
            yield self._find(layout, planted)

    def _find(self, layout: LayoutCase, planted: PlantedError) -> Finding:
        started = time.perf_counter()
        try:
            records = self._pool.run(layout.policy.ranks, worker.train, self._case, layout.policy, planted)
            comparison = compare(assemble(records), self._one, self._start, self._recorded)
        except (RankFailed, ValueError) as error:
            return Finding(layout, time.perf_counter() - started, error=str(error))
        return Finding(layout, time.perf_counter() - started, comparison)


def recorded_places(case: Case) -> list[dict[Place, int]]:
    """The recorded routes of each step as `Run.routes` has them."""
    layers = [layer for layer, moe in enumerate(case.architecture.moe_layers) if moe]
    return [
        {
            (layer, key, int(position)): sum(1 << int(expert) for expert in routes.experts[position, number])
            for key, routes in (step or {}).items()
            for position in routes.recorded.nonzero()[0]
            for number, layer in enumerate(layers)
        }
        for step in case.routes or [{} for _ in case.steps]
    ]
