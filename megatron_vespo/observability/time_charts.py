"""Where the time went."""

from html import escape
from typing import Any

from megatron_vespo.observability.charts import Plot, linear_axis
from megatron_vespo.observability.report_charts import Figure
from megatron_vespo.observability.run_folder import Rows, RunFolder, column

MOST_BARS = 60
PARTS = (
    ("generate", "blue"),
    ("wait for rewards", "violet"),
    ("wait for groups", "age0"),
    ("train", "green"),
    ("sync weights", "orange"),
)
"""What the loop spends its time on, one after the other. In an asynchronous run sampling and grading go on beside all of
it, and "wait for groups" is what the trainer had to wait for them."""
OF_ROLLOUTS = ("time/generate", "time/reward_wait", "time/wait")
"""The first of PARTS, in rows of kind `rollout`."""


def batch_times(run: RunFolder) -> list[tuple[int, list[float]]]:
    """(batch, seconds of each of PARTS) in order. A sync belongs to the batch whose last step it follows.

    A batch of an asynchronous run is what lies between two weight updates, with a row of kind `rollout` for each step.
    """
    sampling: dict[int, list[float]] = {}
    for row in run.kind("rollout"):
        if row.get("batch") is not None:
            before = sampling.get(row["batch"], [0.0] * len(OF_ROLLOUTS))
            sampling[row["batch"]] = [sum(both) for both in zip(before, _seconds(row, *OF_ROLLOUTS), strict=True)]
    train: dict[int, float] = {}
    batch_at_step: dict[int, int] = {}
    for row in run.kind("step"):
        if row.get("batch") is not None:
            train[row["batch"]] = train.get(row["batch"], 0.0) + (row.get("time/train") or 0.0)
            batch_at_step[row["step"]] = row["batch"]
    sync: dict[int, float] = {}
    for row in run.kind("sync"):
        batch = batch_at_step.get(row["step"])
        if batch is not None:
            sync[batch] = sync.get(batch, 0.0) + (row.get("time/sync") or 0.0)
    times = []
    for batch in sorted({*sampling, *train}):
        parts = sampling.get(batch, [0.0] * len(OF_ROLLOUTS))
        times.append((batch, [*parts, train.get(batch, 0.0), sync.get(batch, 0.0)]))
    return times


def _seconds(row: dict[str, Any], *names: str) -> list[float]:
    return [row.get(name) or 0.0 for name in names]


def time_per_batch(run: RunFolder) -> Figure | None:
    times = batch_times(run)
    if not any(sum(parts) for _, parts in times):
        return None
    every = -(-len(times) // MOST_BARS)
    bars = [times[start : start + every] for start in range(0, len(times), every)]
    means = [[sum(parts[k] for _, parts in bar) / len(bar) for k in range(len(PARTS))] for bar in bars]
    lefts = [float(bar[0][0]) for bar in bars]
    rights = [left + every for left in lefts]
    title, one, each, seconds = (
        ("Time per weight update", "weight update", "What each weight update and the steps before it took", "an update")
        if run.asynchronous
        else ("Time per batch", "rollout batch", "What each rollout batch took", "a batch")
    )
    y = linear_axis([sum(parts) for parts in means], f"seconds {seconds}", include=[0.0])
    plot = Plot(linear_axis([*lefts, *rights], one, exact=True), y, f"time per {one}", x_name="")
    parts = [(name, colour, [bar[k] for bar in means]) for k, (name, colour) in enumerate(PARTS)]
    plot.stacked_bars(lefts, rights, [part for part in parts if any(part[2])])
    caption = f"{each}, part by part" + (f" (means over {every} of them)." if every > 1 else ".")
    if run.asynchronous:
        caption += (
            " Sampling goes on beside all of it; where the wait for groups is tall, it is too slow for the trainer."
        )
    else:
        caption += " The tallest colour is what to make faster."
    return Figure("time", title, caption, plot.html())


def time_total(run: RunFolder) -> Figure | None:
    """The whole run as one bar and a table; what no row accounts for is shown as such."""
    totals = [("start up", "grid-strong", _union_seconds(run.kind("phase")))]
    times = batch_times(run)
    totals += [(name, colour, sum(parts[k] for _, parts in times)) for k, (name, colour) in enumerate(PARTS)]
    # The sync before the first batch belongs to no batch.
    sync = len(PARTS)
    totals[sync] = (*totals[sync][:2], sum(value or 0.0 for value in column(run.kind("sync"), "time/sync")))
    evaluate = sum(value or 0.0 for value in column(run.kind("evaluation"), "time/evaluate"))
    totals.append(("evaluate", "red", evaluate))
    known, wall = sum(seconds for _, _, seconds in totals), run.summary.get("wall_seconds")
    if not known:
        return None
    if wall and wall > known:
        totals.append(("everything else", "grid", wall - known))
    whole = sum(seconds for _, _, seconds in totals)
    shown = [item for item in totals if item[2] > 0]
    bar = "".join(
        f'<i style="flex-grow:{seconds:.3f};background:var(--{colour})" title="{escape(name, quote=True)}: {seconds:.1f} s"></i>'
        for name, colour, seconds in shown
    )
    rows = ""
    for name, colour, seconds in shown:
        key = f'<i class="key bar" style="--key:var(--{colour})"></i>'
        rows += f"<tr><th>{key}{escape(name)}</th>{_seconds_cells(seconds, whole)}</tr>"
        rows += _part_rows(run, name, whole)
    body = f'<div class="total-bar">{bar}</div><table class="numbers">{rows}</table>'
    caption = (
        "The whole run. Start-up is paid once, so it weighs less in a longer run; its parts run side by side, and parts of "
        "a line are part of its time."
    )
    return Figure("time-total", "Where the time went", caption, body)


def _seconds_cells(seconds: float, whole: float) -> str:
    return f"<td>{seconds:,.1f} s</td><td>{100 * seconds / whole:.1f}%</td>"


def _part_rows(run: RunFolder, name: str, whole: float) -> str:
    """What a line of the table is made of, where rows tell. Parts of the start-up run side by side."""
    parts: list[tuple[str, float]] = []
    if name == "start up":
        parts = [(f"{row.get('phase')}", row.get("time/seconds") or 0.0) for row in run.kind("phase")]
    elif name == "sync weights":
        rows = run.kind("sync")
        parts = [(part, sum(value or 0.0 for value in column(rows, f"time/{part}"))) for part in SYNC_PARTS]
    return "".join(
        f'<tr class="part"><th>{escape(part)}</th>{_seconds_cells(seconds, whole)}</tr>'
        for part, seconds in parts
        if seconds
    )


SYNC_PARTS = ("connect", "send", "flush", "verify")
"""One after the other; gathering and loading are within sending."""


def _union_seconds(rows: Rows) -> float:
    """Seconds in which at least one of these rows was under way; a row ends at its timestamp."""
    spans = sorted((row["timestamp"] - (row.get("time/seconds") or 0.0), row["timestamp"]) for row in rows)
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
