"""What a grid came to, as a small file to keep: the figures of all its runs, and how they were made."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vespo.observability.comparison import comparison_rows
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.run_folder import RunFolder


@dataclass(frozen=True)
class Origin:
    """How a grid was run: what a file of results says beside its figures."""

    title: str
    command: str
    """That makes these figures again."""
    planned: int
    """Runs of the grid."""
    commit: str | None
    """Of the sources when the file was written; None where they are in no repository."""
    machine: str
    cores: int


def results(origin: Origin, variants: Sequence[Variant]) -> dict[str, Any]:
    """Plain data that JSON can hold.

    Returns:
        `title`, `command`, `commit`, `machine`, `cores` of `origin`; `date` of the last measurement, UTC; `seeds`;
        `planned` runs and how many `finished`; `wall_hours` of those, one after the other, and `core_hours`, as many times
        the cores of the machine, whatever else ran on it; `variants`: the rows of `comparison_rows`.
    """
    rows = comparison_rows(variants)
    runs = [run for row in rows for run in row["runs"]]
    finished = [run for run in runs if run["status"] == "finished"]
    hours = sum(run["wall_seconds"] or 0.0 for run in finished) / 3600
    return {
        "title": origin.title,
        "command": origin.command,
        "commit": origin.commit,
        "date": _date([run for variant in variants for run in variant.runs]),
        "machine": origin.machine,
        "cores": origin.cores,
        "seeds": sorted({run["seed"] for run in runs if run["seed"] is not None}),
        "planned": origin.planned,
        "finished": len(finished),
        "wall_hours": round(hours, 3),
        "core_hours": round(hours * origin.cores, 3),
        "variants": rows,
    }


def write_results(path: Path, origin: Origin, variants: Sequence[Variant]) -> None:
    """Replace the file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps(results(origin, variants), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _date(runs: Sequence[RunFolder]) -> str | None:
    times = [row["timestamp"] for run in runs for rows in run.rows.values() for row in rows if "timestamp" in row]
    return datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else None
