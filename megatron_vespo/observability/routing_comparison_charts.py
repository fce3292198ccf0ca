"""Charts that set off, R2 and R3 beside each other: a colour for each, full lines native, dashed ones replayed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_vespo.observability.charts import Axis, linear_axis, log_axis, percent
from megatron_vespo.observability.collapse import Points, final_accuracy, points, points_of
from megatron_vespo.observability.comparison_charts import (
    HEIGHT,
    LEARNING,
    Measure,
    Spread,
    VariantPlot,
    colour_of,
    draw,
    spreads,
    three_digits,
)
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.report_charts import STEPS, Figure, step_axis
from megatron_vespo.observability.run_folder import PROBE_KINDS, RunFolder
from megatron_vespo.observability.table_figures import mean_of

MODES = ("off", "R2", "R3")
NATIVE, REPLAYED = "routing_probe/native/k3", "routing_probe/replayed/k3"
ACCURACY = LEARNING[0]
AT_EQUAL_VERSIONS = Measure(
    "agreement",
    "Agreement with the engine",
    "Share of (position, layer) for which engine and trainer choose the same experts while both hold the same weights: "
    "probed trajectories of each rollout batch, before its first step. Near 100% where both compute alike.",
    lambda run: points_of(run.kind(*PROBE_KINDS), "routing_probe/same_set"),
    label="same set of experts",
    form=percent,
    include=(0.99, 1.0),
    dots=True,
)
OVER_STEPS = Measure(
    "drift",
    "Agreement with recorded routes, by step",
    "Share of (position, layer) for which the trainer would still choose the recorded experts. It falls within a rollout "
    "batch as weights move on, and rises with the next. Recorded by the engine; with R2, by the trainer itself at the "
    "start of the batch.",
    lambda run: points(run, "step", "routing/same_set"),
    label="same set of experts",
    form=percent,
    include=(0.99, 1.0),
)


@dataclass(frozen=True)
class Group:
    """Variants that differ in nothing but `routing.replay`. `by_mode` is in the order of MODES."""

    name: str
    by_mode: dict[str, Variant]

    @property
    def variants(self) -> list[Variant]:
        """One for each of MODES, so that each has the same colour in all charts; without runs where there is none."""
        return [replace(self.by_mode.get(mode, Variant(mode, [])), name=mode) for mode in MODES]


def mode_of(variant: Variant) -> str:
    return str(variant.runs[0].setting("routing.replay", "off")) if variant.runs else "off"


def grouped(variants: Sequence[Variant]) -> list[Group]:
    """In the order of first mention. `vespo, replay=R3` and `vespo, replay=off` are of the group `vespo`."""
    groups: dict[str, dict[str, Variant]] = {}
    for variant in variants:
        mode = mode_of(variant)
        name = ", ".join(part for part in variant.name.split(", ") if part != f"replay={mode}")
        # two variants may differ in a setting that is not in their names' replay part
        name = name if mode not in groups.get(name, {}) else variant.name
        groups.setdefault(name or "all", {})[mode] = variant
    return [Group(name, {mode: found[mode] for mode in MODES if mode in found}) for name, found in groups.items()]


def within_group(group: Group, number: int) -> list[Figure]:
    """Accuracy, mismatch and agreement over steps. `number` makes the figures' names differ between groups."""
    figures = [draw(ACCURACY, group.variants), mismatch(group)]
    figures += [draw(measure, group.variants) for measure in (AT_EQUAL_VERSIONS, OVER_STEPS)]
    return [replace(figure, name=f"{figure.name}-{number}") for figure in figures if figure is not None]


def side_by_side(groups: Sequence[Group]) -> list[Figure]:
    """The mismatch of every group, where there are many and runs are short."""
    caption = "k3 in every rollout batch. Full: the trainer routes by itself. Dashed: it is given the engine's routes."
    figures = [(number, group, mismatch(group)) for number, group in enumerate(groups)]
    return [
        replace(figure, name=f"{figure.name}-{number}", title=group.name, caption=caption)
        for number, group, figure in figures
        if figure is not None
    ]


def mismatch(group: Group) -> Figure | None:
    """k3 of engine against trainer in every rollout batch, natively and with the engine's routes."""
    runs = [run for variant in group.variants for run in variant.runs]
    x = linear_axis([0.0, *(step_axis(run).high for run in runs)], STEPS, exact=True)
    lines = _native_and_replayed(group.variants, lambda run, name: points_of(run.kind(*PROBE_KINDS), name))
    return _drawn(
        Figure(
            "mismatch",
            "Mismatch of engine and trainer",
            "k3 of the two's log-probs of sampled tokens, equal weights, on probed trajectories of each rollout batch. Full: "
            "the trainer routes by itself. Dashed: it is given the engine's routes. The gap is what routing accounts for; "
            "both are measured whatever the run trains with.",
            "",
        ),
        x,
        lines,
        lambda heights: log_axis(heights, "k3, log scale"),
        three_digits,
    )


def noise_of(group: Group) -> tuple[str, float] | None:
    """(`selection` or `logits`, scale) of the engine's router noise; None where it has none."""
    settings = [run.setting("rollout.engine.router_noise") for variant in group.variants for run in variant.runs]
    return (str(settings[0]["on"]), float(settings[0]["scale"])) if settings and settings[0] else None


def dose_response(groups: Sequence[Group]) -> list[Figure]:
    """Mismatch, agreement and accuracy after training over the scale of the noise, for each kind of noise.

    An engine without noise is at scale 0 of both.
    """
    noises = [noise_of(group) for group in groups]
    of_kinds = []
    for on in dict.fromkeys(noise[0] for noise in noises if noise):
        of_kind = [
            (noise[1] if noise else 0.0, group)
            for noise, group in zip(noises, groups, strict=True)
            if noise is None or noise[0] == on
        ]
        scales = [scale for scale, _ in of_kind]
        x = linear_axis([0.0, *scales], f"router noise on {on}: standard deviation, logits", exact=True)
        modes = [
            Variant(mode, [run for _, group in of_kind for run in group.variants[index].runs])
            for index, mode in enumerate(MODES)
        ]
        of_kinds.append(_over_scale(x, modes, on))
    # one measure after the other, so that the kinds of noise stand beside each other
    return [figure for same in zip(*of_kinds, strict=True) for figure in same if figure is not None]


def _over_scale(x: Axis, modes: Sequence[Variant], on: str) -> list[Figure | None]:
    """`modes`: all runs of each of MODES with this kind of noise or none."""

    def at_scale(run: RunFolder, value: float | None) -> Points:
        noise = run.setting("rollout.engine.router_noise")
        return [(float(noise["scale"]) if noise else 0.0, value)] if value is not None else []

    def batches(run: RunFolder, name: str) -> Points:
        return at_scale(run, mean_of(points_of(run.kind(*PROBE_KINDS), name)))

    effect = (
        "Replay repairs wrong choices; experts are weighted by clean logits on both sides."
        if on == "selection"
        else "Replay repairs wrong choices, but not the noise that stays in the experts' weights."
    )
    return [
        _drawn(
            Figure(f"dose-k3-{on}", f"Mismatch, noise on {on}", f"Mean k3 of probed trajectories. {effect}", ""),
            x,
            _native_and_replayed(modes, batches),
            lambda heights: log_axis(heights, "k3, log scale"),
            three_digits,
        ),
        _drawn(
            Figure(
                f"dose-agreement-{on}",
                f"Agreement with the engine, noise on {on}",
                "Share of (position, layer) with the same experts, equal weights: how far the dial is turned.",
                "",
            ),
            x,
            _one_line_each(modes, lambda run: batches(run, "routing_probe/same_set")),
            lambda heights: linear_axis(heights, "same set of experts", form=percent),
            percent,
        ),
        _drawn(
            Figure(
                f"dose-accuracy-{on}",
                f"Accuracy after training, noise on {on}",
                "On held-out prompts, answered by the noisy engine itself, so that a part of a fall is the engine's.",
                "",
            ),
            x,
            _one_line_each(modes, lambda run: at_scale(run, final_accuracy(run))),
            lambda heights: linear_axis(heights, "share of right responses", form=percent),
            percent,
        ),
    ]


@dataclass(frozen=True)
class _Line:
    name: str
    colour: str
    dashed: bool
    points: list[Spread]
    runs: int


def _native_and_replayed(variants: Sequence[Variant], read: Callable[[RunFolder, str], Points]) -> list[_Line]:
    return [
        _Line(
            f"{variant.name}, {called}",
            colour_of(index),
            name == REPLAYED,
            spreads([read(run, name) for run in variant.runs]),
            len(variant.runs),
        )
        for index, variant in enumerate(variants)
        for name, called in ((NATIVE, "native"), (REPLAYED, "replayed"))
    ]


def _one_line_each(variants: Sequence[Variant], read: Callable[[RunFolder], Points]) -> list[_Line]:
    return [
        _Line(variant.name, colour_of(index), False, spreads([read(run) for run in variant.runs]), len(variant.runs))
        for index, variant in enumerate(variants)
    ]


def _drawn(
    figure: Figure, x: Axis, lines: list[_Line], axis: Callable[[list[float]], Axis], form: Callable[[float], str]
) -> Figure | None:
    """`figure` with a body, or None where there is nothing to draw."""
    heights = [height for line in lines for point in line.points for height in (point.low, point.high)]
    if not heights:
        return None
    x_name = "step" if x.label == STEPS else "noise"
    plot = VariantPlot(x, axis(heights), figure.title, HEIGHT, form=form, x_name=x_name)
    for line in lines:
        if line.points:
            plot.variant(line.name, line.colour, line.points, line.runs, line.dashed, dots=True)
    return replace(figure, body=plot.html())
