"""Which experts tokens went to: recorded routes against the trainer's own choice. Only runs that record routes have them."""

import math
from collections.abc import Callable, Sequence
from html import escape

from megatron_vespo.observability.charts import Axis, Plot, Ramp, log_axis, nice_ticks, percent, short
from megatron_vespo.observability.findings import masked_positions
from megatron_vespo.observability.report_charts import Figure, Maker, step_axis
from megatron_vespo.observability.run_folder import PROBE_KINDS, Rows, RunFolder, at_equal_weights, column, mean

MOST_COLUMNS = 100
"""Of a heat map: some pixels for each also on a phone."""
MOST_DOTS = 60
REASONS = {
    "missing": "the engine sent none",
    "truncated": "fewer rows than asked for, or not base64",
    "layers": "another number of layers",
    "range": "an expert that the model does not have",
    "duplicates": "an expert twice for one token",
    "zero_layer": "a layer that was never filled in",
    "mixed_versions": "weights changed while the request ran",
    "retracted": "the engine computed the request anew",
    "older_cache": "a cached prefix that older weights may have computed",
}
NO_NUMBER = "-"


AGREEMENT = Ramp((1.0, 0.99, 0.95, 0.9, 0.8, 0.6), ("100%", "99%", "95%", "90%", "80%", "≤ 60%"))
LOAD = Ramp((1.0, 1.25, 1.5, 2.0, 3.0, 5.0), ("1", "1.25", "1.5", "2", "3", "≥ 5"))


def agreement_map(run: RunFolder) -> Figure | None:
    found = heat_map(run, "same_set", AGREEMENT, "same experts", "agreement of experts by layer and step")
    if found is None:
        return None
    body, every = found
    whose = "the trainer at the start of the rollout batch" if run.setting("routing.replay") == "R2" else "the engine"
    course = (
        "At the first step of a rollout batch both have the same weights, so what differs is numeric; at later steps the "
        "router has also moved, which replay holds fixed."
    )
    if run.asynchronous:
        whose = "the trainer before the step" if run.setting("routing.replay") == "R2" else "the engine"
        course = (
            "Where both have the same weights, what differs is numeric; where data is older, the router has also moved, "
            "which replay holds fixed."
        )
    caption = (
        f"Share of positions where {whose} recorded the experts that the trainer's router would now choose by itself. "
        + course
        + _of_steps(every)
    )
    return Figure("expert-agreement", "Do the experts agree?", caption, body + _agreement_table(run))


def _agreement_table(run: RunFolder) -> str:
    names = {"same_set": "same experts", "same_slots": "same order", "overlap": "in common", "margin": "margin"}
    steps = run.kind("step")
    groups = {
        "equal weights": at_equal_weights(steps),
        "older data" if run.asynchronous else "later steps": [row for row in steps if row.get("staleness") != 0],
    }
    body = ""
    for label, rows in groups.items():
        if not rows:
            continue
        values = {name: mean(column(rows, f"routing/{name}")) for name in names}
        cells = [_number(value, short if name == "margin" else share) for name, value in values.items()]
        body += f"<tr><th>{label}</th>{_cells(cells)}</tr>"
    head = "".join(f"<th>{title}</th>" for title in names.values())
    return f'<table class="numbers"><tr><th>run mean</th>{head}</tr>{body}</table>'


def load_map(run: RunFolder) -> Figure | None:
    found = heat_map(run, "largest_load", LOAD, "load", "load of the busiest expert by layer and step")
    if found is None:
        return None
    body, every = found
    idle = mean(column(run.kind("step"), "routing/unused"))
    caption = (
        "Tokens of the busiest expert over the mean of all experts, as recorded: 1 is balanced. With expert parallelism the "
        "busiest one sets the pace, and a layer that keeps rising sends its tokens to ever fewer experts."
        + (f" On average {percent(idle)} of experts had no token in a step." if idle else "")
        + _of_steps(every)
    )
    return Figure("expert-load", "Load of the busiest expert", caption, body)


def heat_map(run: RunFolder, name: str, ramp: Ramp, label: str, title: str) -> tuple[str, int] | None:
    """MoE layer x optimizer step of routing.jsonl: (HTML, steps in a column); None where nothing was measured."""
    rows = {int(row["step"]): row[name] for row in run.routing if "step" in row and isinstance(row.get(name), list)}
    layers = max((len(values) for values in rows.values()), default=0)
    if not layers:
        return None
    first, last = min(rows), max(rows)
    every = steps_in_a_column(last - first + 1, run.steps_between_updates or 1)
    spans, values = binned(rows, layers, every)
    x = Axis(first - 0.5, last + 0.5, ticks=_whole_ticks(first, last, 6), label="optimizer steps")
    y = Axis(-0.5, layers - 0.5, ticks=_whole_ticks(0, layers - 1, 6), label=f"{label}, by MoE layer")
    height = round(max(90, min(36 * layers, 300), 4 * layers))
    plot = Plot(x, y, title, height, form=share if ramp is AGREEMENT else short)
    plot.cells(spans, values, ramp, "layer")
    return plot.html(), every


def steps_in_a_column(steps: int, per_batch: int) -> int:
    """At most MOST_COLUMNS columns, in whole rollout batches (asynchronous: what lies between two weight updates) or in
    equal parts of one: otherwise the saw-tooth within a batch and the columns would make stripes that are not there."""
    least = max(1, -(-steps // MOST_COLUMNS))
    if least >= per_batch:
        return -(-least // per_batch) * per_batch if least > 1 else 1
    return next(size for size in range(least, per_batch + 1) if per_batch % size == 0)


def binned(
    rows: dict[int, list[float | None]], layers: int, every: int
) -> tuple[list[tuple[float, float]], list[list[float | None]]]:
    """Means over `every` steps, the first of them step 1: ([left, right] of each column, its values by layer).

    A column without any step is left out; a layer without a number in it is None.
    """
    columns: dict[int, list[list[float | None]]] = {}
    for step, values in sorted(rows.items()):
        columns.setdefault((step - 1) // every, []).append(values)
    first, last = min(rows), max(rows)
    spans, means = [], []
    for number, members in columns.items():
        start = number * every + 1
        spans.append((max(start, first) - 0.5, min(start + every - 1, last) + 0.5))
        means.append([mean([_finite(one[layer]) for one in members if layer < len(one)]) for layer in range(layers)])
    return spans, means


def replay_effect(run: RunFolder) -> Figure | None:
    rows = [row for row in run.kind(*PROBE_KINDS) if "routing_probe/native/k3" in row]
    if not rows:
        return None
    steps = column(rows, "step")
    native, replayed = (column(rows, f"routing_probe/{name}/k3") for name in ("native", "replayed"))
    plot = Plot(step_axis(run), log_axis([*native, *replayed], "k3 a token"), "k3 with and without replay over steps")
    few = len(rows) <= MOST_DOTS
    if few:  # the larger dots are below: where both are equal, both are seen
        plot.dots("", steps, native, "orange", size=10)
    plot.line("native routing", steps, native, "orange")
    plot.line("engine's routes", steps, replayed, "blue", dashed=few, dots=few)
    zeros = sum(value is not None and not value > 0 for value in [*native, *replayed])
    which = "sampled for it now and then" if run.asynchronous else "of each rollout batch"
    caption = (
        f"Mismatch of engine and trainer on a few trajectories {which}, at equal weights: with the experts that the trainer "
        "chooses, and with those that the engine chose. The gap is what flipped experts cost; what is left below "
        "is numeric error within them."
        + (f" {zeros} values of 0 or less have no place on a logarithmic axis." if zeros else "")
    )
    return Figure("replay", "What replay repairs", caption, plot.html() + _probe_table(rows))


def _probe_table(rows: Rows) -> str:
    names = {"mean_abs": "mean |diff|", "k1": "k1", "k3": "k3", "share_above_ln2": "above ln 2"}
    body = ""
    for kind, label in (("native", "native routing"), ("replayed", "engine's routes")):
        cells = [
            _number(mean(column(rows, f"routing_probe/{kind}/{name}")), lambda value: f"{value:.2g}") for name in names
        ]
        body += f"<tr><th>{label}</th>{_cells(cells)}</tr>"
    head = "".join(f"<th>{title}</th>" for title in names.values())
    return f'<table class="numbers"><tr><th>run mean</th>{head}</tr>{body}</table>'


def records(run: RunFolder) -> Figure | None:
    """How much was recorded, why the rest was not, and what it cost to move."""
    rollouts, steps = run.kind("rollout"), run.kind("step")
    missing = column(rollouts, "routing/missing_share")
    if not any(value is not None for value in missing):
        rollouts, missing = steps, column(steps, "routing/missing_share")
    there = [value for value in missing if value is not None]
    if not there:
        return None
    lines = [
        ("positions without a route", percent(sum(there) / len(there)), ""),
        (
            "in the worst " + ("rollout batch" if rollouts is not steps and not run.asynchronous else "step"),
            percent(max(there)),
            "part",
        ),
    ]
    for reason, count in masked_positions(run).most_common():
        meaning = f": {REASONS[reason]}" if reason in REASONS else ""
        lines.append((f"{reason}{meaning}", f"{count:,} positions", "part"))
    hops = (
        (rollouts, "wire", "bytes a token from the engine (base64)"),
        (rollouts, "stored", "bytes a token in memory"),
        (steps, "sent", "bytes a token to all ranks together"),
        (steps, "largest_rank", "bytes a token to the rank that gets most"),
    )
    for rows, name, label in hops:
        value = mean(column(rows, f"routing/bytes_per_token_{name}"))
        if value is not None:
            lines.append((label, f"{value:,.4g}", ""))
    body = "".join(
        f"<tr{f' class={style!r}' if style else ''}><th>{escape(label)}</th><td>{escape(value)}</td></tr>"
        for label, value, style in lines
    )
    caption = (
        "What has no route is routed natively and counts in no share above. Run means; reasons are counted over the whole "
        "run."
    )
    return Figure("recorded-routes", "What was recorded", caption, f'<table class="numbers routes">{body}</table>')


def share(value: float) -> str:
    """With a digit more than `percent`; 100% is all of them, not nearly all."""
    return "100%" if value >= 1 else f"{min(99.99, 100 * value):.4g}%"


def _of_steps(every: int) -> str:
    return f" Each column is the mean over {every} steps." if every > 1 else ""


def _whole_ticks(low: int, high: int, count: int) -> tuple[tuple[float, str], ...]:
    return tuple((tick, short(tick)) for tick in nice_ticks(low, high, count) if tick == int(tick))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return NO_NUMBER if value is None else form(value)


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


ROUTING: tuple[Maker, ...] = (agreement_map, load_map, replay_effect, records)
