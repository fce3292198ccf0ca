import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from small_run import (
    asynchronous_row,
    checkpoint_row,
    evaluation_row,
    layers_of_step,
    mismatch_row,
    restart_row,
    rollout_row,
    routes_of_probe,
    routes_of_rollout,
    routes_of_step,
    step_row,
    sync_row,
    turns_row,
)

from megatron_vespo.routing.agreement import Agreement
from megatron_vespo.routing.codec import RoutesFault

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, set[str]]:
    """Names in the first column of each kind's table."""
    sections = re.split(r"^## (\w+)", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    first_columns = {}
    for kind, text in zip(sections[::2], sections[1::2], strict=True):
        cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
        first_columns[kind] = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return first_columns


def test_every_metric_of_a_row_is_documented_and_nothing_else():
    assert documented() == {
        "rollout": set(rollout_row(0)) | set(routes_of_rollout(0)) | set(asynchronous_row()) | set(turns_row()),
        "mismatch": set(mismatch_row()) | set(routes_of_probe(0)),
        "step": set(step_row(0, 0)) | set(step_row(0, 1)) | set(routes_of_step(0)),
        "sync": set(sync_row(0)),
        "evaluation": set(evaluation_row("before", 0.5)),
        "checkpoint": set(checkpoint_row(5)),
        "restart": set(restart_row()),
        "phase": {"phase", "time/seconds"},
    }


def test_every_figure_and_fault_of_recorded_routes_is_documented():
    figures = {field.name for field in fields(Agreement)} - {"rows"}
    assert {f"routing/{name}" for name in figures} <= documented()["step"]
    assert {f"routing/masked/{kind}" for kind in get_args(RoutesFault)} <= documented()["rollout"]
    (line,) = re.findall(r"^- `routing\.jsonl`.*$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert figures == set(layers_of_step(0)) == set(re.findall(r"`([a-z_]+)`", line)) - {"step", "null"}
