"""A page that compares variants, each with a run for every seed, and the same comparison as plain data."""

import json
import os.path
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_vespo.config import ConfigError
from megatron_vespo.observability.collapse import (
    accuracy_before,
    best_accuracy,
    collapse,
    final_accuracy,
    generated_tokens,
    points,
    points_of,
    smoothed,
    stalest_steps,
    status,
    trained_tokens,
    wall_seconds,
)
from megatron_vespo.observability.comparison_charts import (
    CORRECTION,
    LEARNING,
    colour_of,
    cost,
    draw,
    palette,
)
from megatron_vespo.observability.comparison_grid import (
    FEW,
    Variant,
    arranged,
    grid_table,
    last_of,
)
from megatron_vespo.observability.pages import shown, write_page
from megatron_vespo.observability.run_folder import PROBE_KINDS, RunFolder, rhythm
from megatron_vespo.observability.table_figures import NOT_SET, cell, mean_of, median_of, spread_of

COSTS = ("wall_seconds", "generated_tokens", "trained_tokens")
ROUTING = ("probe_k3_native", "probe_k3_replayed")
MEASURED = (
    *("accuracy_before", "accuracy_final", "accuracy_best", "log_weight_std", "ess", "response_length"),
    *ROUTING,
    *COSTS,
)
"""Numbers of a run that a variant has mean, least and largest of."""
NOT_COMPARED = ("run_dir", "seed")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy_before", "Accuracy before", _percent),
    ("accuracy_final", "after", _percent),
    ("accuracy_best", "best", _percent),
    ("log_weight_std", "Std of log W", lambda value: f"{value:.2g}"),
    ("ess", "Effective sample size", _percent),
    ("response_length", "Response length", lambda value: f"{value:.1f}"),
    ("probe_k3_native", "k3 to the engine", lambda value: f"{value:.1e}"),
    ("probe_k3_replayed", "k3 with replay", lambda value: f"{value:.1e}"),
    ("wall_seconds", "Wall time", lambda value: str(timedelta(seconds=round(value)))),
)
"""(number, heading, how it is written) of what the table shows; those of ROUTING only where some run has them."""


def write_comparison(path: str | Path, title: str, variants: Sequence[Variant], note: str = "") -> Path:
    """Write one self-contained page about variants and their runs, finished or not.

    The page loads nothing; it links to each run's report.html where there is one, relative to its own place. All
    texts are escaped.

    Args:
        path: the .html file to write; its folder is made.
        note: shown under the title, as plain text.

    Raises:
        ConfigError: there is no run to compare.
    """
    if not any(variant.runs for variant in variants):
        raise ConfigError(f"{path}: no run to compare. Give the folders of at least one run")
    path = Path(path)
    rows, arrangement = comparison_rows(variants), arranged(variants)
    return write_page(
        path,
        "comparison.html",
        title=title,
        note=note,
        subtitle=_subtitle(variants),
        palette=palette(len(arrangement.lines)),
        legend=[(colour_of(index), line) for index, line in enumerate(arrangement.lines)],
        heat=_heat(rows),
        columns=[column for column in COLUMNS if column[0] not in ROUTING or any(row[column[0]]["n"] for row in rows)],
        table=_table(rows, variants, path.parent),
        unfolded=len(variants) <= FEW,
        incomplete=_incomplete(rows),
        collapsed=_collapsed(rows),
        sections=_sections(variants),
        differences=config_differences(variants),
        mixed=mixed_settings(variants),
    )


def comparison_rows(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The comparison as plain data that JSON can hold: one row a variant, in their order.

    Returns:
        For each variant `name`, `method` and `point` (of a grid: its variant's name and its values), `seeds` (how many
        runs), `finished`, `collapsed` (how many of them), for each name of MEASURED a mapping of `mean`, `min`, `max` and
        `n` (runs that have the number; None and 0 where none has; those of COSTS are of finished runs, since a run that
        stopped early looks cheap), and `runs`: for each run its folder's name, `seed`, `status`, `steps`,
        `planned_steps`, `collapsed` (the reason or None), `accuracy_latest` and `accuracy_latest_step`,
        `accuracy_over_steps` ([step, accuracy] of each evaluation), and the number itself for each name of MEASURED.
    """
    rows = []
    for variant in variants:
        runs = [_run_row(run) for run in variant.runs]
        row: dict[str, Any] = {
            "name": variant.name,
            "method": variant.method or variant.name,
            "point": dict(variant.point),
            "seeds": len(runs),
            "finished": sum(run["status"] == "finished" for run in runs),
            "collapsed": sum(run["collapsed"] is not None for run in runs),
        }
        for name in MEASURED:
            counted = [run for run in runs if name not in COSTS or run["status"] == "finished"]
            row[name] = spread_of([run[name] for run in counted])
        rows.append({**row, "runs": runs})
    return rows


def _run_row(run: RunFolder) -> dict[str, Any]:
    evaluations = points(run, "evaluation", "accuracy")
    latest_step, latest = evaluations[-1] if evaluations else (None, None)
    return {
        "run": run.path.resolve().name,
        "seed": run.setting("seed"),
        "status": status(run),
        "steps": max((row["step"] for row in run.kind("step")), default=0),
        "planned_steps": run.setting("algorithm.steps", run.setting("steps")),
        "collapsed": collapse(run),
        "accuracy_before": accuracy_before(run),
        "accuracy_final": final_accuracy(run),
        "accuracy_best": best_accuracy(run),
        "accuracy_latest": latest,
        "accuracy_latest_step": latest_step,
        "accuracy_over_steps": [list(evaluation) for evaluation in evaluations],
        "log_weight_std": _at_stalest(run, "log_weight/std"),
        "ess": _at_stalest(run, "ess"),
        "response_length": _at_end(run, "response/length_mean"),
        **{name: _probe_k3(run, name) for name in ROUTING},
        "wall_seconds": wall_seconds(run),
        "generated_tokens": generated_tokens(run),
        "trained_tokens": trained_tokens(run),
    }


def _at_stalest(run: RunFolder, name: str) -> float | None:
    """Median over rollout batches: single batches can be far out, and a mean would show only them."""
    return median_of(stalest_steps(run, name))


def _probe_k3(run: RunFolder, name: str) -> float | None:
    """Mean over probes of engine against trainer at equal weights, without or with the engine's routes."""
    return mean_of(points_of(run.kind(*PROBE_KINDS), f"routing_probe/{name.removeprefix('probe_k3_')}/k3"))


def _at_end(run: RunFolder, name: str) -> float | None:
    ends = smoothed([value for _, value in points(run, "rollout", name)])
    return ends[-1] if ends else None


def config_differences(variants: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """(key, value of each variant) of the settings in which variants differ, but for NOT_COMPARED.

    A key is a dotted path of config.yaml. Where the runs of a variant differ among themselves, their values are joined
    by " / ". Runs without a config.yaml are passed over.
    """
    settings = [_settings(variant) for variant in variants]
    known = [values for values in settings if values]
    keys = dict.fromkeys(name for values in known for name in values)
    return [
        (name, [" / ".join(values.get(name, [NOT_SET])) for values in settings])
        for name in keys
        if len({tuple(values.get(name, [NOT_SET])) for values in known}) > 1
    ]


def mixed_settings(variants: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """(variant, keys) where the runs of one variant differ in more than NOT_COMPARED: then they are not its seeds."""
    mixed = []
    for variant in variants:
        keys = [name for name, values in _settings(variant).items() if len(values) > 1]
        if keys:
            mixed.append((variant.name, keys))
    return mixed


def _settings(variant: Variant) -> dict[str, list[str]]:
    """Each setting of a variant's runs with its values, every value once."""
    configs = [_flat(run.config) for run in variant.runs if run.config]
    keys = dict.fromkeys(name for config in configs for name in config if name not in NOT_COMPARED)
    return {name: list(dict.fromkeys(config.get(name, NOT_SET) for config in configs)) for name in keys}


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """Settings by dotted path, as text. Items of a list of mappings have their number in the path."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict) and value:
            found.update((f"{name}.{inner}", text) for inner, text in _flat(value).items())
        else:
            found[str(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _sections(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    sections = [
        ("learning", "Learning", shown(draw(measure, variants) for measure in LEARNING)),
        ("correction", "Off-policy correction", shown(draw(measure, variants) for measure in CORRECTION)),
        ("time", "Cost", shown([cost(variants)])),
    ]
    return [{"id": name, "title": title, "figures": drawn} for name, title, drawn in sections if drawn]


def _subtitle(variants: Sequence[Variant]) -> str:
    """What all runs share."""
    runs = [run for variant in variants for run in variant.runs]

    def shared(key: str) -> Any:
        values = [run.setting(key) for run in runs]
        return values[0] if all(value == values[0] for value in values) else None

    sources = shared("data.sources") or []
    tasks = [source.get("task") or source.get("path") or source.get("target") for source in sources]
    steps, rhythms = shared("algorithm.steps"), {rhythm(run) for run in runs}
    parts = [
        " + ".join(str(task) for task in tasks if task),
        shared("model.path"),
        shared("algorithm.objective.kernel.name"),
        rhythms.pop() if len(rhythms) == 1 else None,
        f"{steps:,} steps" if steps else None,
        f"{len(runs)} runs" if len(runs) > 1 else "1 run",
    ]
    return " · ".join(str(part) for part in parts if part)


def _run_name(run: dict[str, Any]) -> str:
    return run["run"] if run["seed"] is None else f"seed {run['seed']}"


def _state(run: dict[str, Any]) -> str:
    """What a run came to, in words; empty for one that finished."""
    if run["status"] == "finished":
        return ""
    of = f" of {run['planned_steps']}" if run["planned_steps"] else ""
    return f"{run['status'].splitlines()[0]}, after {run['steps']}{of} steps"


def _incomplete(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{row['name']}, {_run_name(run)}: {_state(run)}" for row in rows for run in row["runs"] if _state(run)] + [
        f"{row['name']}: there is no run" for row in rows if not row["runs"]
    ]


def _collapsed(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(variant, how many runs, each with its reason) of the variants with a collapsed run."""
    return [
        (
            row["name"],
            f"{row['collapsed']} of {row['seeds']} runs",
            [f"{_run_name(run)}: {run['collapsed']}" for run in row["runs"] if run["collapsed"]],
        )
        for row in rows
        if row["collapsed"]
    ]


def _heat(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Accuracy after training of methods by values, as texts with a strength of colour, 0 to 1; None without a grid."""
    table = grid_table(rows)
    if table is None:
        return None
    means = [row["accuracy_final"]["mean"] for row in rows if row["accuracy_final"]["n"]]
    low, high = (min(means), max(means)) if means else (0.0, 1.0)
    lines = []
    for name, at in table.lines:
        there = [row["accuracy_final"]["mean"] for row in at if row is not None and row["accuracy_final"]["n"]]
        cells = []
        for row in at:
            mean, below = cell(row["accuracy_final"], row["seeds"], _percent) if row is not None else (NOT_SET, "")
            value = None if row is None else row["accuracy_final"]["mean"]
            cells.append(
                {
                    "mean": mean,
                    "below": below,
                    "collapsed": f"{row['collapsed']} of {row['seeds']} collapsed" if row and row["collapsed"] else "",
                    "strength": 0.0 if value is None or high == low else (value - low) / (high - low),
                    "best": len(there) > 1 and value == max(there),
                }
            )
        lines.append((name, cells))
    return {"axis": last_of(table.axis), "columns": table.columns, "lines": lines}


def _table(rows: Sequence[dict[str, Any]], variants: Sequence[Variant], page_folder: Path) -> list[dict[str, Any]]:
    """The table as texts: a line a variant, with the lines of its runs."""
    place = _scale(rows)
    table = []
    arrangement = arranged(variants)
    for row, variant in zip(rows, variants, strict=True):
        finals = [run["accuracy_final"] for run in row["runs"] if run["accuracy_final"] is not None]
        table.append(
            {
                "name": row["name"],
                "colour": colour_of(arrangement.line_of(variant)),
                "seeds": row["seeds"],
                "finished": row["finished"],
                "collapsed": row["collapsed"],
                "cells": {name: cell(row[name], row["seeds"], form) for name, _, form in COLUMNS},
                "dots": [place(value) for value in finals],
                "before": None if row["accuracy_before"]["mean"] is None else place(row["accuracy_before"]["mean"]),
                "runs": [
                    _run_line(of_run, run, page_folder) for of_run, run in zip(row["runs"], variant.runs, strict=True)
                ],
            }
        )
    return table


def _run_line(row: dict[str, Any], run: RunFolder, page_folder: Path) -> dict[str, Any]:
    cells = {name: NOT_SET if row[name] is None else form(row[name]) for name, _, form in COLUMNS}
    if row["accuracy_final"] is None and row["accuracy_latest"] is not None:
        cells["accuracy_final"] = f"{_percent(row['accuracy_latest'])} at step {row['accuracy_latest_step']:.0f}"
    report = run.path / "report.html"
    link = quote(Path(os.path.relpath(report.resolve(), page_folder.resolve())).as_posix()) if report.exists() else None
    name = row["run"] if row["seed"] is None else f"seed {row['seed']} · {row['run']}"
    return {"name": name, "link": link, "state": _state(row), "collapsed": row["collapsed"], "cells": cells}


def _scale(rows: Sequence[dict[str, Any]]) -> Callable[[float], float]:
    """Where an accuracy lies, in percent of the widest range of accuracies in the table."""
    seen = [run[name] for row in rows for run in row["runs"] for name in ("accuracy_before", "accuracy_final")]
    there = [value for value in seen if value is not None]
    low, high = (min(there), max(there)) if there else (0.0, 1.0)
    return lambda value: 100 * (value - low) / (high - low) if high > low else 50.0
