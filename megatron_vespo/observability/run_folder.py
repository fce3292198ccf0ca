"""Read what a run left in its folder, finished or not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vespo.config import ConfigError

Rows = list[dict[str, Any]]

FILES = {
    "config.yaml": "the resolved configuration",
    "metrics.jsonl": "every measurement",
    "weights.jsonl": "prompts of every step, and log W, phi and advantage of every trajectory",
    "routing.jsonl": "agreement and load of every MoE layer at every step",
    "samples_before.json": "sample responses before training",
    "samples_after.json": "sample responses after training",
    "summary.json": "the run's results",
}
MISMATCH_KINDS = ("step", "mismatch")
"""Kinds of rows that may compare engine and trainer (`mismatch/*`): steps on data of the trainer's own weights, and what
asynchronous runs sample for it."""
PROBE_KINDS = ("rollout", "mismatch")
"""Kinds of rows that may have figures of probed trajectories (`routing_probe/*`): synchronous, asynchronous."""
WITH_ROUTES = ("routing.jsonl",)
"""Of FILES: only runs that record routes have them."""


@dataclass
class RunFolder:
    """A run's files, parsed. What is absent is empty here, and named in `missing`.

    `broken_lines` counts lines of the .jsonl files that are not JSON objects (a killed run can leave one).
    """

    path: Path
    rows: dict[str, Rows] = field(default_factory=dict)
    """Rows of metrics.jsonl by kind, in the order written. A null that stands for a number not finite is that number."""
    weights: Rows = field(default_factory=list)
    routing: Rows = field(default_factory=list)
    """Of each step, vectors over the MoE layers; an element that is not a number is None."""
    samples_before: Rows = field(default_factory=list)
    samples_after: Rows = field(default_factory=list)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    broken_lines: int = 0

    def kind(self, *kinds: str) -> Rows:
        """Rows of one kind in the order written, or of several in the order of steps."""
        if len(kinds) == 1:
            return self.rows.get(kinds[0], [])
        return sorted((row for kind in kinds for row in self.rows.get(kind, [])), key=lambda row: row["step"])

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of config.yaml by its dotted path."""
        node: Any = self.config
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                return default
            node = node[name]
        return node

    @property
    def asynchronous(self) -> bool:
        """Whether sampling and training went on side by side. Its rows' `batch` counts weight updates."""
        return isinstance(self.setting("algorithm.asynchronous"), dict)

    @property
    def steps_between_updates(self) -> int | None:
        """Optimizer steps from one weight update to the next; synchronous: on each rollout batch. None: not known."""
        return self.setting("algorithm.asynchronous.sync_every" if self.asynchronous else "algorithm.staleness")

    @property
    def records_routes(self) -> bool:
        """Whether config.yaml asks for routes. A bare `off` of YAML is read as false."""
        return self.setting("routing.replay", "off") not in ("off", False) or bool(self.setting("routing.record"))


def read_run(run_dir: str | Path) -> RunFolder:
    """Read a run folder.

    Raises:
        ConfigError: no such folder, or it holds no run at all, or a file is not what it should be.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Give the run_dir of a run")
    run = RunFolder(folder, missing=[name for name in FILES if not (folder / name).exists()])
    if {"config.yaml", "metrics.jsonl"} <= set(run.missing):
        raise ConfigError(f"{folder}: holds neither config.yaml nor metrics.jsonl, so it is not the folder of a run")
    metrics, broken_metrics = _read_lines(folder / "metrics.jsonl")
    run.weights, broken_weights = _read_lines(folder / "weights.jsonl")
    run.routing, broken_routing = _read_lines(folder / "routing.jsonl")
    run.broken_lines = broken_metrics + broken_weights + broken_routing
    for row in metrics:
        row.update((name, float(text)) for name, text in row.pop("not_finite", {}).items())
        run.rows.setdefault(row.get("kind", ""), []).append(row)
    run.samples_before = _read_json(folder / "samples_before.json", [])
    run.samples_after = _read_json(folder / "samples_after.json", [])
    run.summary = _read_json(folder / "summary.json", {})
    if "config.yaml" not in run.missing:
        run.config_text = (folder / "config.yaml").read_text(encoding="utf-8")
        try:
            run.config = yaml.safe_load(run.config_text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{folder / 'config.yaml'}: not readable as YAML: {error}") from None
    if not run.records_routes:
        run.missing = [name for name in run.missing if name not in WITH_ROUTES]
    return run


def at_equal_weights(steps: Rows) -> Rows:
    """Of rows of steps, those on data that the engines sampled under the trainer's own weights.

    Only in a synchronous run is that the first mini-batch of each rollout batch."""
    return [row for row in steps if row.get("staleness") == 0]


def rhythm(run: RunFolder) -> str | None:
    """How often the run's engines got new weights, in words."""
    steps = run.steps_between_updates
    if steps is None:
        return None
    return (
        f"asynchronous, {steps} steps between weight updates" if run.asynchronous else f"{steps} steps a rollout batch"
    )


def column(rows: Rows, name: str) -> list[float | None]:
    """One measurement over rows; None where a row lacks it."""
    return [float(row[name]) if isinstance(row.get(name), (int, float)) else None for row in rows]


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _read_lines(path: Path) -> tuple[Rows, int]:
    rows, broken = [], 0
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                broken += 1
    return rows, broken


def _read_json(path: Path, empty: Any) -> Any:
    if not path.exists():
        return empty
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}. Remove it to leave it out of the report") from None
    if type(value) is not type(empty):
        raise ConfigError(f"{path}: expected a JSON {'list' if empty == [] else 'object'}")
    return value
