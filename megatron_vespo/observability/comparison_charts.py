"""The charts that compare variants: a line for the mean over a variant's runs, a band from the least to the largest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from megatron_vespo.observability.charts import Plot, linear_axis, log_axis, percent, short
from megatron_vespo.observability.collapse import (
    Points,
    batch_means,
    points,
    stalest_steps,
    status,
    wall_seconds,
)
from megatron_vespo.observability.comparison_grid import FEW, Panel, Variant, arranged
from megatron_vespo.observability.report_charts import STEPS, Figure, step_axis
from megatron_vespo.observability.run_folder import RunFolder, column
from megatron_vespo.observability.time_charts import PARTS, batch_times

MOST_POINTS = 120
HEIGHT = 270
PANEL_HEIGHT = 190
THIN = "stroke-width:1px;opacity:0.5"
REST = "start-up and the rest"
BATCHES = " Where a run is asynchronous, a batch is what lies between two weight updates."
PHASES = (*PARTS, ("evaluate", "red"), (REST, "grid-strong"))

PALETTE = (
    ("#2f6fde", "#6aa5ff"),
    ("#d9770b", "#f5a344"),
    ("#178a5b", "#43c592"),
    ("#d03b4e", "#ff7386"),
    ("#7c4ddb", "#b08cff"),
    ("#0b94a6", "#3fd0e0"),
    ("#c93f9b", "#f586cf"),
    ("#8a5a2b", "#c99a6b"),
    ("#7b8a10", "#c3d24a"),
    ("#4b5567", "#c4ccd9"),
    ("#5eb1ee", "#2e86c9"),
    ("#ee8f77", "#c4573c"),
)
"""(light, dark) colour of each variant; a thirteenth starts again, dashed."""


@dataclass(frozen=True)
class Spread:
    """What the runs of a variant measured at one step: the mean, the least, the largest, of how many runs."""

    step: float
    mean: float
    low: float
    high: float
    runs: int


def three_digits(value: float) -> str:
    """A number as a label: enough to tell variants apart, short enough for twelve lines of them."""
    return short(float(f"{value:.3g}"))


@dataclass(frozen=True)
class Measure:
    """A chart to draw: what to read from a run, and how to show it."""

    name: str
    title: str
    caption: str
    read: Callable[[RunFolder], Points]
    label: str = ""
    form: Callable[[float], str] = three_digits
    log: bool = False
    include: tuple[float, ...] = ()
    level: float | None = None
    dots: bool = False


def colour_of(index: int) -> str:
    """The CSS variable of a line's colour, by its place in the legend."""
    return f"variant{index}"


def palette(lines: int) -> list[tuple[str, str, str]]:
    """(variable, light, dark) for each of so many lines."""
    return [(colour_of(index), *PALETTE[index % len(PALETTE)]) for index in range(lines)]


def spreads(runs: Sequence[Points]) -> list[Spread]:
    """Mean, least and largest over runs at each step, over the runs that have the step."""
    at: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run:
            at.setdefault(step, []).append(value)
    return [
        Spread(step, sum(values) / len(values), min(values), max(values), len(values))
        for step, values in sorted(at.items())
    ]


def thinned(run: Points, width: int) -> Points:
    """Means over stretches of `width` steps, each at its first step."""
    if width == 1:
        return run
    stretches: dict[float, list[float]] = {}
    for step, value in run:
        stretches.setdefault(step // width * width, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(stretches.items())]


class VariantPlot(Plot):
    """A plot whose lines have bands, with one line of hover text for both. The page has the legend, once for all."""

    def single_run(self, run: Points, colour: str) -> None:
        """A thin line without hover text."""
        for stretch in self._runs([step for step, _ in run], [value for _, value in run]):
            path = "M" + "L".join(self._point(x, y) for x, y in stretch)
            self._shapes.append(f'<path class="line" d="{path}" style="stroke:var(--{colour});{THIN}"/>')

    def variant(self, name: str, colour: str, line: list[Spread], of: int, dashed: bool, dots: bool) -> None:
        """The mean as a line, least to largest as a band. `of`: how many runs the variant has."""
        steps = [point.step for point in line]
        self.fill_between(steps, [point.low for point in line], [point.high for point in line], colour, 0.12)
        self.line("", steps, [point.mean for point in line], colour, dashed=dashed, dots=dots, hover=False)
        self._remember(name, colour, steps, [self._text(point, of) for point in line])

    def _text(self, point: Spread, of: int) -> str:
        mean = self.form(point.mean)
        if of == 1:
            return mean
        count = f"n {of}" if point.runs == of else f"n {point.runs} of {of}"
        return f"{mean} ({self.form(point.low)} to {self.form(point.high)}, {count})"


def draw(measure: Measure, variants: Sequence[Variant]) -> Figure | None:
    """One measurement of all variants over steps, in the panels of `arranged`, or None where no run has it."""
    panels = arranged(variants).panels
    read = [[[measure.read(run) for run in variant.runs] for variant in panel.variants] for panel in panels]
    steps = {step for panel in read for runs in panel for run in runs for step, _ in run}
    if not steps:
        return None
    x = linear_axis([0.0, *(step_axis(run).high for variant in variants for run in variant.runs)], STEPS, exact=True)
    width = math.ceil(x.high / MOST_POINTS) if len(steps) > MOST_POINTS else 1
    read = [[[thinned(run, width) for run in runs] for runs in panel] for panel in read]
    heights = [
        height for panel in read for runs in panel for point in spreads(runs) for height in (point.low, point.high)
    ]
    if measure.log:
        y = log_axis(heights, measure.label)
    else:
        y = linear_axis(heights, measure.label, include=measure.include, form=measure.form)
    asynchronous = any(run.asynchronous for variant in variants for run in variant.runs)
    caption = measure.caption + (BATCHES if asynchronous and "batch" in measure.caption else "")
    caption += f" Each point is a mean over {width} steps." if width > 1 else ""
    if len(panels) == 1:
        plot = VariantPlot(x, y, f"{measure.title} over steps", HEIGHT, form=measure.form)
        return Figure(measure.name, measure.title, caption, _panel(plot, measure, panels[0], read[0]))
    body = ""
    for panel, measured in zip(panels, read, strict=True):
        name = f"{measure.title} over steps, {panel.title}"
        plot = VariantPlot(x, replace(y, label=panel.title), name, PANEL_HEIGHT, form=measure.form)
        body += _panel(plot, measure, panel, measured)
    body = f'<div class="head"><span>{escape(y.label)}</span></div><div class="panels">{body}</div>'
    return Figure(measure.name, measure.title, caption, body, wide=True)


def _panel(plot: VariantPlot, measure: Measure, panel: Panel, read: Sequence[Sequence[Points]]) -> str:
    if measure.level is not None:
        plot.level(measure.level)
    for variant, place, runs in zip(panel.variants, panel.lines, read, strict=True):
        colour, dashed = colour_of(place), place >= len(PALETTE)
        if len(variant.runs) > 1 and len(panel.variants) <= FEW:
            for run in runs:
                plot.single_run(run, colour)
        name = variant.method if panel.title else variant.name
        plot.variant(name, colour, spreads(runs), len(variant.runs), dashed, measure.dots)
        ends = _ends(variant, runs)
        plot.dots("", [step for step, _ in ends], [value for _, value in ends], colour, size=10)
    return plot.html()


def _ends(variant: Variant, read: Sequence[Points]) -> Points:
    """The last point of each run that did not finish."""
    runs = zip(variant.runs, read, strict=True)
    return [measured[-1] for run, measured in runs if measured and status(run) != "finished"]


def seconds_by_phase(run: RunFolder) -> list[float]:
    """Seconds of each of PHASES. The rest is what no measurement accounts for, start-up above all."""
    times = batch_times(run)
    seconds = [sum(parts[k] for _, parts in times) for k in range(len(PARTS))]
    # The sync before the first batch belongs to no batch.
    seconds[-1] = sum(value or 0.0 for value in column(run.kind("sync"), "time/sync"))
    seconds.append(sum(value or 0.0 for value in column(run.kind("evaluation"), "time/evaluate")))
    return [*seconds, max(0.0, (wall_seconds(run) or 0.0) - sum(seconds))]


def cost(variants: Sequence[Variant]) -> Figure | None:
    """A bar a variant: seconds by phase, mean over its finished runs, or over all of them if none finished."""
    arrangement, bars = arranged(variants), []
    for variant in variants:
        finished = [run for run in variant.runs if status(run) == "finished"]
        runs = finished or variant.runs
        each = [seconds_by_phase(run) for run in runs]
        if each:
            means = [sum(parts) / len(each) for parts in zip(*each, strict=True)]
            bars.append((variant, means, _runs_in_words(len(runs), len(variant.runs), bool(finished))))
    longest = max((sum(means) for _, means, _ in bars), default=0.0)
    if not longest:
        return None
    body = "".join(
        f'<div class="cost"><span>{key(arrangement.line_of(variant))}{escape(variant.name)}</span>'
        f"<div>{_bar(means, longest)}</div><small>{sum(means):,.0f} s, {words}</small></div>"
        for variant, means, words in bars
    )
    legend = "".join(
        f'<li><i class="key bar" style="--key:var(--{colour})"></i>{escape(name)}</li>'
        for k, (name, colour) in enumerate(PHASES)
        if any(means[k] for _, means, _ in bars)
    )
    caption = (
        "Seconds of the whole run, part by part, as a mean over finished runs. Generating should be the largest part. "
        "Compare variants only if nothing else ran on the machine."
    )
    body = f'<div class="head"><ul>{legend}</ul></div><div class="costs">{body}</div>'
    return Figure("cost", "Seconds by phase", caption, body, wide=True)


def key(index: int) -> str:
    """A variant's mark in its colour, for tables and lists."""
    return f'<i class="key bar" style="--key:var(--{colour_of(index)})"></i>'


def _bar(means: Sequence[float], longest: float) -> str:
    parts = "".join(
        f'<i style="flex-grow:{seconds:.3f};background:var(--{colour})" title="{escape(name, quote=True)}: {seconds:,.1f} s"></i>'
        for (name, colour), seconds in zip(PHASES, means, strict=True)
        if seconds > 0
    )
    return f'<div class="total-bar" style="width:{100 * sum(means) / longest:.2f}%">{parts}</div>'


def _runs_in_words(used: int, there: int, finished: bool) -> str:
    if not finished:
        return f"n {used}, none finished"
    return f"n {used}" if used == there else f"n {used} of {there}"


LEARNING = (
    Measure(
        "accuracy",
        "Held-out accuracy",
        "Share of right responses to prompts that are never trained on. It should rise and stay; a band that widens says "
        "that the seed decides more than the variant.",
        lambda run: points(run, "evaluation", "accuracy"),
        label="share of right responses",
        form=percent,
        dots=True,
    ),
    Measure(
        "reward",
        "Reward",
        "Mean reward of each rollout batch, on training prompts. It should rise with held-out accuracy, with noise; a "
        "steady fall is a collapse.",
        lambda run: points(run, "rollout", "reward/mean"),
        label="mean of a rollout batch",
    ),
    Measure(
        "length",
        "Response length",
        "Mean tokens of a response. Growth with reward is thinking that pays; growth without it, or a fall to almost "
        "nothing, is a length bias.",
        lambda run: points(run, "rollout", "response/length_mean"),
        label="tokens",
        include=(0.0,),
    ),
    Measure(
        "entropy",
        "Entropy",
        "Mean of -log mu over the sampled tokens of each rollout batch. A slow fall is learning; a sharp rise says that "
        "the policy falls apart, a plunge to 0 with low reward that exploration ended too early.",
        lambda run: batch_means(run, "entropy/old_policy"),
        label="nats a token",
        include=(0.0,),
    ),
)
CORRECTION = (
    Measure(
        "log-weight-std",
        "Spread of log W",
        "Standard deviation of log W over trajectories, at the last mini-batch of each rollout batch, where data is "
        "stalest. Healthy up to about 1 (dashed); above 2 the data is too stale or the learning rate too high.",
        lambda run: stalest_steps(run, "log_weight/std"),
        label="standard deviation, log scale",
        log=True,
        level=1.0,
    ),
    Measure(
        "sample-size",
        "Effective sample size",
        "(sum W)^2 / (n sum W^2) at the last mini-batch of each rollout batch: how much of it a plain importance-weighted "
        "mean would really use. Healthy above 30%.",
        lambda run: stalest_steps(run, "ess"),
        label="share of trajectories",
        form=percent,
        include=(0.0, 1.0),
    ),
    Measure(
        "phi",
        "Mean coefficient phi",
        "How much of the batch counts, at the last mini-batch of each rollout batch. Healthy near 1; far below, steps are "
        "small although data is paid for. Kernels differ here by design.",
        lambda run: stalest_steps(run, "phi/mean"),
        label="mean over trajectories",
        include=(0.0,),
        level=1.0,
    ),
    Measure(
        "dead",
        "Trajectories that do not count",
        "Share with phi below 0.01 at the last mini-batch of each rollout batch. Healthy below 10%; above 20% the data is "
        "too stale for the learning rate.",
        lambda run: stalest_steps(run, "phi/share_below_0.01"),
        label="share of trajectories",
        form=percent,
        include=(0.0,),
    ),
    Measure(
        "kept",
        "Gradient that the kernel lets through",
        "log(mean of abs(phi A) / mean of abs(A)) at the last mini-batch of each rollout batch. Healthy between -0.5 and 0.2; "
        "below -1.5 the gradient is starved: few trajectories make the step.",
        lambda run: stalest_steps(run, "gradient/log_kept"),
        label="log of the share",
        include=(0.0,),
        level=0.0,
    ),
    Measure(
        "sides",
        "Gradient of good responses",
        "Share of abs(phi A), summed over tokens, that is in trajectories with an advantage above 0, at the last mini-batch "
        "of each rollout batch. Near 0 a step only drives out what is bad.",
        lambda run: stalest_steps(run, "gradient/positive_share"),
        label="share of the gradient",
        form=percent,
        include=(0.0, 1.0),
        level=0.5,
    ),
)
