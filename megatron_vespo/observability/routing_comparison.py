"""What routing replay changed, variant by variant: as plain data, and as a page."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.config import ConfigError
from megatron_vespo.observability.charts import percent
from megatron_vespo.observability.collapse import points, points_of
from megatron_vespo.observability.comparison import comparison_rows
from megatron_vespo.observability.comparison_charts import colour_of, palette, three_digits
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.pages import shown, write_page
from megatron_vespo.observability.routing_comparison_charts import (
    MODES,
    Group,
    dose_response,
    grouped,
    mode_of,
    noise_of,
    side_by_side,
    within_group,
)
from megatron_vespo.observability.run_folder import MISMATCH_KINDS, PROBE_KINDS, RunFolder
from megatron_vespo.observability.table_figures import cell, mean_of, median_of, spread_of

DIFFERENCES = ("k1", "k3", "share_above_ln2")
MEASURED = (
    *(f"{name}_{scored}" for scored in ("native", "replayed") for name in DIFFERENCES),
    "k3_lowered_by",
    "k3_trained_on",
    "same_set_equal_versions",
    "same_set_steps",
    "missing_share",
    "step_seconds",
    "engine_tokens_per_second",
)
"""Numbers of a run beside those of `comparison_rows`; a variant has mean, least and largest of each."""


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy_before", "Accuracy before", percent),
    ("accuracy_final", "after", percent),
    ("k3_native", "k3 native", three_digits),
    ("k3_replayed", "k3 replayed", three_digits),
    ("k3_lowered_by", "lowered, times", three_digits),
    ("share_above_ln2_native", "Above ln 2, native", percent),
    ("share_above_ln2_replayed", "replayed", percent),
    ("same_set_equal_versions", "Same experts, equal weights", percent),
    ("same_set_steps", "in steps", percent),
    ("missing_share", "Routes missing", percent),
    ("step_seconds", "Step, s", three_digits),
    ("engine_tokens_per_second", "Engine, tokens/s", three_digits),
)
"""(number, heading, how it is written) of what the table shows."""


def routing_rows(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The comparison as plain data that JSON can hold: the rows of `comparison_rows` with what concerns routing added.

    Returns:
        For each variant also `replay`, `engine_dtype`, `router_noise`, and for each name of MEASURED `mean`, `min`, `max`
        and `n`; in each of its `runs` the number itself, None where the run did not come to measure it.
        Of the probed trajectories of each rollout batch (asynchronous: of each comparison at equal weights), as a mean
        over these: `k1_`, `k3_`, `share_above_ln2_` of
        engine against trainer, who routes by itself (`native`) or as the engine did (`replayed`); `k3_lowered_by`, the
        ratio of the two k3; `same_set_equal_versions`, share of (position, layer) for which both choose the same experts.
        `k3_trained_on`: with the routes that training used, all trajectories, mean over what was compared at equal
        weights (first mini-batches).
        `same_set_steps`: the trainer's own choice against the recorded routes (R2: its own of the start of the batch;
        else the engine's), mean over steps. `missing_share` of the engine's routes, mean over batches.
        `step_seconds`, `engine_tokens_per_second`: medians over steps and over batches.
    """
    rows = comparison_rows(variants)
    for row, variant in zip(rows, variants, strict=True):
        for of_run, run in zip(row["runs"], variant.runs, strict=True):
            of_run.update(routing_figures(run))
        for name in MEASURED:
            row[name] = spread_of([of_run[name] for of_run in row["runs"]])
        row["replay"] = mode_of(variant)
        row["engine_dtype"] = _engine_dtype(variant.runs[0]) if variant.runs else None
        row["router_noise"] = variant.runs[0].setting("rollout.engine.router_noise") if variant.runs else None
    return rows


def routing_figures(run: RunFolder) -> dict[str, float | None]:
    """The numbers of MEASURED, of one run."""
    probed = run.kind(*PROBE_KINDS)
    figures = {
        f"{name}_{scored}": mean_of(points_of(probed, f"routing_probe/{scored}/{name}"))
        for scored in ("native", "replayed")
        for name in DIFFERENCES
    }
    native, replayed = figures["k3_native"], figures["k3_replayed"]
    figures |= {
        "k3_lowered_by": native / replayed if native is not None and replayed is not None and replayed > 0 else None,
        "k3_trained_on": mean_of(points_of(run.kind(*MISMATCH_KINDS), "mismatch/k3")),
        "same_set_equal_versions": mean_of(points_of(probed, "routing_probe/same_set")),
        "same_set_steps": mean_of(points(run, "step", "routing/same_set")),
        "missing_share": mean_of(points(run, "rollout", "routing/missing_share")),
        "step_seconds": median_of(points(run, "step", "time/train")),
        "engine_tokens_per_second": median_of(points(run, "rollout", "speed/generated_tokens_per_second")),
    }
    return figures


def write_routing_comparison(path: str | Path, title: str, variants: Sequence[Variant], more: str = "") -> Path:
    """Write one self-contained page: a table, the dose response where engines had noise, and curves with off, R2 and R3
    beside each other for all that differs otherwise.

    Args:
        path: the .html file to write; its folder is made.
        more: address of a page to go on with, relative to this one; left out if empty.

    Raises:
        ConfigError: there is no run to compare.
    """
    if not any(variant.runs for variant in variants):
        raise ConfigError(f"{path}: no run to compare. Give the folders of at least one run")
    path = Path(path)
    groups = grouped(variants)
    return write_page(
        path,
        "routing_comparison.html",
        title=title,
        more=more,
        palette=palette(len(MODES)),
        modes=[(mode, colour_of(index)) for index, mode in enumerate(MODES) if any(mode in g.by_mode for g in groups)],
        columns=COLUMNS,
        table=_table(routing_rows(variants), groups),
        sections=_sections(groups),
    )


def write_routing_figures(path: Path, title: str, variants: Sequence[Variant]) -> None:
    """{"title", "variants": `routing_rows`}, replaced in one move."""
    document = {"title": title, "variants": routing_rows(variants)}
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _sections(groups: Sequence[Group]) -> list[dict[str, Any]]:
    sections = []
    if any(noise_of(group) for group in groups):
        sections.append(("dose", "Dose response", dose_response(groups)))
        sections.append(("groups", "Every engine", side_by_side(groups)))
    else:
        sections += [(f"group{index}", group.name, within_group(group, index)) for index, group in enumerate(groups)]
    return [{"id": name, "title": title, "figures": shown(figures)} for name, title, figures in sections if figures]


def _table(rows: Sequence[dict[str, Any]], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A body a group, a line a variant."""
    by_name = {row["name"]: row for row in rows}
    return [
        {
            "name": group.name,
            "lines": [
                {
                    "mode": mode,
                    "colour": colour_of(MODES.index(mode)),
                    "runs": _runs(by_name[variant.name]),
                    "collapsed": by_name[variant.name]["collapsed"],
                    "cells": [
                        cell(by_name[variant.name][name], by_name[variant.name]["seeds"], form)
                        for name, _, form in COLUMNS
                    ],
                }
                for mode, variant in group.by_mode.items()
            ],
        }
        for group in groups
    ]


def _runs(row: dict[str, Any]) -> str:
    return str(row["seeds"]) if row["finished"] == row["seeds"] else f"{row['finished']} of {row['seeds']} finished"


def _engine_dtype(run: RunFolder) -> str | None:
    return run.setting("rollout.engine.dtype") or run.setting("model.dtype")
