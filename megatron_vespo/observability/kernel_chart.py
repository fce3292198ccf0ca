"""The kernel phi over the importance weights that really occurred."""

import math

from megatron_vespo.observability.charts import Axis, Plot, linear_axis, nice_ticks, short
from megatron_vespo.observability.report_charts import Figure, age_groups
from megatron_vespo.observability.run_folder import RunFolder

BINS = 90
MOST_DOTS = 1500
ALWAYS_SHOWN = (-2.5, 1.5)
WIDEST = (-14.0, 8.0)

Occurrence = tuple[float, float, float, int]
"""log W, phi, advantage, age in optimizer steps of one trajectory at one step."""


def kernel(run: RunFolder) -> Figure | None:
    """The two curves of the configured kernel, measured (log W, phi) as dots on them, and log W's spread by staleness."""
    seen = _occurrences(run)
    if not seen:
        return None
    x = _log_weight_axis(seen)
    inside = [item for item in seen if x.low <= item[0] <= x.high]
    ages = age_groups([item[3] for item in seen])
    upper = Plot(x, linear_axis([item[1] for item in inside], "phi", include=[0.0, 1.25]), "kernel phi over log W", 260)
    upper.x_labels, upper.x_name = False, "log W"
    upper.upright(0.0)
    _curves(upper, run)
    every = -(-len(inside) // MOST_DOTS)
    for _, colour, group in reversed(ages):  # the youngest, least spread, on top
        dots = [item for item in inside[::every] if item[3] in group]
        upper.dots("", [item[0] for item in dots], [item[1] for item in dots], colour, size=5.5, opacity=0.75)
    caption = (
        "Above: the coefficient of a trajectory's gradient over its importance weight W; VESPO's curve is solid for "
        "advantages >= 0, dashed for negative ones. Each dot is a trajectory at a step, as measured. Below: how often each "
        "log W occurred, by staleness (every row scaled to its own peak): older data spreads, and the kernel fades out what "
        f"spreads too far. {len(seen):,} trajectory-steps, every {_ordinal(every)} drawn"
        + (f", {len(seen) - len(inside):,} outside the axis." if len(inside) < len(seen) else ".")
    )
    body = upper.html() + _ridges(x, inside, ages).html()
    return Figure("kernel", "The kernel at work", caption, body, wide=True)


def _ordinal(every: int) -> str:
    return "one" if every == 1 else f"{every}th" if every > 3 else {2: "2nd", 3: "3rd"}[every]


def _occurrences(run: RunFolder) -> list[Occurrence]:
    seen: list[Occurrence] = []
    for row in run.weights:
        vectors = (row.get(name, []) for name in ("log_weight", "phi", "advantage", "age"))
        seen += [(w, p, a, int(age)) for w, p, a, age in zip(*vectors, strict=False) if None not in (w, p, a, age)]
    return seen


def _log_weight_axis(seen: list[Occurrence]) -> Axis:
    """From about the 0.2% to the 99.8% quantile of log W, but never less than what shows the kernel's shape."""
    ordered = sorted(item[0] for item in seen)
    low = ordered[int(0.002 * (len(ordered) - 1))]
    high = ordered[math.ceil(0.998 * (len(ordered) - 1))]
    low = max(WIDEST[0], min(ALWAYS_SHOWN[0], low))
    high = min(WIDEST[1], max(ALWAYS_SHOWN[1], high))
    ticks = tuple((tick, short(tick)) for tick in nice_ticks(low, high, 6))
    return Axis(
        low,
        high,
        ticks=ticks,
        label="log W  (0: the policy gives the response the probability that it was sampled with)",
    )


def _curves(plot: Plot, run: RunFolder) -> None:
    kernel = "algorithm.objective.kernel"
    if run.setting(f"{kernel}.name") != "vespo" or run.setting(f"{kernel}.length_normalisation", "none") != "none":
        return  # only then is phi a function of W alone
    xs = [plot.x.low + (plot.x.high - plot.x.low) * index / 240 for index in range(241)]
    for sign, name, dashed in (("positive", "advantage >= 0", False), ("negative", "advantage < 0", True)):
        c1, c2 = (run.setting(f"{kernel}.{sign}.{name}") for name in ("c1", "c2"))
        if c1 is not None and c2 is not None:
            ys = [math.exp(c1 * x + c2 * (1 - math.exp(x))) for x in xs]
            plot.line(name, xs, ys, "ink", dashed=dashed)


def _ridges(x: Axis, seen: list[Occurrence], ages: list[tuple[str, str, set[int]]]) -> Plot:
    rows = len(ages)
    ticks = tuple((rows - 1 - index + 0.3, label) for index, (label, _, _) in enumerate(ages))
    plot = Plot(
        x, Axis(0.0, rows + 0.1, ticks=ticks, label="staleness"), "spread of log W by staleness", 46 * rows + 20
    )
    width = (x.high - x.low) / BINS
    for index, (_, colour, group) in enumerate(ages):
        counts = [0] * BINS
        for log_weight, _, _, age in seen:
            if age in group:
                counts[min(BINS - 1, int((log_weight - x.low) / width))] += 1
        base, peak = float(rows - 1 - index), max(*counts, 1)
        xs = [x.low + width * (edge // 2 + edge % 2) for edge in range(2 * BINS)]
        ys = [base + 0.9 * counts[edge // 2] / peak for edge in range(2 * BINS)]
        plot.area(xs, ys, base, colour, opacity=0.85)
    plot.upright(0.0)
    return plot
