"""The charts of the report: each takes a run and returns a figure, or None where the run has no such measurements."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from megatron_vespo.observability.charts import Axis, Plot, linear_axis, log_axis, percent
from megatron_vespo.observability.run_folder import RunFolder, column, mean

STEPS = "optimizer steps"


@dataclass(frozen=True)
class Figure:
    """`body` is HTML made by us (charts.py escapes what it is given); the texts are plain."""

    name: str
    title: str
    caption: str
    body: str
    wide: bool = False


def step_axis(run: RunFolder) -> Axis:
    steps = [value for kind in ("rollout", "step", "evaluation") for value in column(run.kind(kind), "step")]
    planned = run.setting("algorithm.steps") or run.setting("steps") or 1
    last = max([value for value in steps if value is not None], default=1.0)
    return linear_axis([0.0, max(last, min(planned, last * 4))], STEPS, exact=True, ticks=5)


def learning(run: RunFolder) -> Figure | None:
    rollouts, evaluations = run.kind("rollout"), run.kind("evaluation")
    if not rollouts and not evaluations:
        return None
    rewards, accuracy = column(rollouts, "reward/mean"), column(evaluations, "accuracy")
    plot = Plot(
        step_axis(run), linear_axis([*rewards, *accuracy], include=[0.0, 1.0]), "reward and accuracy over steps"
    )
    plot.line("reward, sampled", column(rollouts, "step"), rewards, "blue")
    if evaluations:
        plot.line("accuracy, held out", column(evaluations, "step"), accuracy, "orange", dots=True)
    caption = (
        "Blue: mean reward of each rollout batch, on training prompts. Orange: accuracy on held-out prompts; "
        "both should rise together, and orange falling behind means memorised prompts."
    )
    return Figure("learning", "Reward and accuracy", caption, plot.html())


def length(run: RunFolder) -> Figure | None:
    rows = run.kind("rollout")
    if not rows:
        return None
    steps, names = column(rows, "step"), ("p10", "mean", "p90")
    low, middle, high = (column(rows, f"response/length_{name}") for name in names)
    plot = Plot(
        step_axis(run), linear_axis([*low, *middle, *high], "tokens", include=[0.0]), "response length over steps"
    )
    plot.band("10% to 90%", steps, low, high, "green")
    plot.line("mean", steps, middle, "green")
    caption = (
        "Tokens in a response: the mean, and the band that holds the middle 80%. Growth with reward is thinking that pays; "
        "growth without it, or a jump to the limit, is the start of a collapse."
    )
    return Figure("length", "Response length", caption, plot.html())


def signal(run: RunFolder) -> Figure | None:
    rows = run.kind("rollout")
    if not rows:
        return None
    steps = column(rows, "step")
    flat, cut = column(rows, "reward/groups_without_variance"), column(rows, "response/truncated_share")
    axis = linear_axis([*flat, *cut], "share", include=[0.0], form=percent)
    plot = Plot(step_axis(run), axis, "groups without variance and truncated responses over steps", form=percent)
    plot.line("groups all alike", steps, flat, "violet")
    plot.line("responses cut off", steps, cut, "orange")
    caption = (
        "Groups whose responses all got one reward teach nothing: near 100% the task is too easy or too hard. "
        "Responses cut at the length limit should stay rare."
    )
    return Figure("signal", "What cannot teach", caption, plot.html())


def entropy(run: RunFolder) -> Figure | None:
    rows = run.kind("step")
    values = column(rows, "entropy/old_policy")
    if not any(value is not None for value in values):
        return None
    plot = Plot(step_axis(run), linear_axis(values, "nats a token", include=[0.0]), "entropy over steps")
    plot.line("", column(rows, "step"), values, "blue")
    caption = (
        "Mean of -log mu over sampled tokens. A slow fall is learning; a plunge to 0 means that exploration ended early, "
        "and a sharp rise that the policy falls apart."
    )
    return Figure("entropy", "Entropy", caption, plot.html())


def log_weight(run: RunFolder) -> Figure | None:
    rows = run.kind("step")
    quantiles = {name: column(rows, f"log_weight/{name}") for name in ("p01", "p10", "p25", "p50", "p75", "p90", "p99")}
    if not any(value is not None for value in quantiles["p50"]):
        return None
    steps = column(rows, "step")
    y = linear_axis([*quantiles["p01"], *quantiles["p99"]], "log W", include=[])
    plot = Plot(step_axis(run), y, "quantiles of log W over steps")
    plot.band("1-99%", steps, quantiles["p01"], quantiles["p99"], "blue", 0.16)
    plot.band("10-90%", steps, quantiles["p10"], quantiles["p90"], "blue", 0.26)
    plot.band("25-75%", steps, quantiles["p25"], quantiles["p75"], "blue", 0.34)
    plot.line("median", steps, quantiles["p50"], "blue")
    plot.level(0.0)
    caption = (
        "How far the policy has moved from the one that sampled. It is narrow at the first step of each rollout batch and "
        "widens to the last: a saw-tooth. A width that grows over the run says that steps are too large."
    )
    return Figure("log-weight", "Importance weights over the run", caption, plot.html())


def phi(run: RunFolder) -> Figure | None:
    rows = run.kind("step")
    middle = column(rows, "phi/mean")
    if not any(value is not None for value in middle):
        return None
    steps, low, high = column(rows, "step"), column(rows, "phi/p10"), column(rows, "phi/p90")
    dead = column(rows, "phi/share_below_0.01")
    plot = Plot(step_axis(run), linear_axis([*low, *high, *dead], "", include=[0.0]), "phi over steps")
    plot.band("10% to 90%", steps, low, high, "blue")
    plot.line("mean phi", steps, middle, "blue")
    plot.line("share below 0.01", steps, dead, "orange")
    plot.level(1.0)
    caption = (
        "The coefficient of each trajectory's gradient: 1 on-policy, near 0 where the weight is extreme. "
        "The orange share is thrown away; above 20% the data is too stale or the rate too high."
    )
    return Figure("phi", "Gradient coefficients", caption, plot.html())


def ages(run: RunFolder) -> Figure | None:
    """How old what was trained on was; nothing to see where all of it was on-policy."""
    found = Counter(int(age) for row in run.weights for age in row.get("age", []) if age is not None)
    oldest, whole = max(found, default=0), found.total()
    if oldest == 0:
        return None
    bars = range(oldest + 1)
    shares = [found[age] / whole for age in bars]
    x = linear_axis([-0.5, oldest + 0.5], "age in optimizer steps", exact=True, ticks=min(oldest + 1, 5))
    plot = Plot(
        x,
        linear_axis(shares, "share of trajectories", include=[0.0], form=percent),
        "share of trained trajectories by age",
        form=percent,
        x_name="age",
    )
    plot.stacked_bars([age - 0.5 for age in bars], [age + 0.5 for age in bars], [("trajectories", "blue", shares)])
    average = sum(age * count for age, count in found.items()) / whole
    caption = (
        "Optimizer steps between the weights that sampled a trajectory's first token and those that trained on it, over "
        f"all {whole:,} trajectories of the run: {average:.1f} on average, {oldest} at most."
    )
    return Figure("ages", "Age of the data", caption, plot.html())


def sample_size(run: RunFolder) -> Figure | None:
    rows = run.kind("step")
    if not any(value is not None for value in column(rows, "ess")):
        return None
    y = linear_axis(column(rows, "ess"), "share of trajectories", include=[0.0, 1.0], form=percent)
    plot = Plot(step_axis(run), y, "effective sample size over steps", form=percent)
    plot.line("", column(rows, "step"), column(rows, "ess"), "grid-strong")
    for label, colour, ages in age_groups([row.get("staleness") for row in rows]):
        there = [row for row in rows if row.get("staleness") in ages]
        plot.dots(f"staleness {label}", column(there, "step"), column(there, "ess"), colour, size=6)
    caption = (
        "(sum W)^2 / sum W^2 as a share: how many trajectories a plain importance-weighted mean would really use. "
        "Low values with a healthy reward are what the kernel is for."
    )
    return Figure("sample-size", "Effective sample size", caption, plot.html())


def mismatch(run: RunFolder) -> Figure | None:
    rows = run.kind("step")
    equal, apart = column(rows, "mismatch/mean_abs"), column(rows, "drift/mean_abs")
    if not any(value is not None for value in [*equal, *apart]):
        return None
    y = log_axis([*equal, *apart], "mean |difference| of log-probs")
    plot = Plot(step_axis(run), y, "mismatch and drift over steps")
    steps = column(rows, "step")
    drifting = [(step, value) for step, value in zip(steps, apart, strict=True) if value is not None]
    plot.dots(
        "drift (other version)", [step for step, _ in drifting], [value for _, value in drifting], "grid-strong", 6
    )
    matching = [(step, value) for step, value in zip(steps, equal, strict=True) if value is not None]
    plot.line(
        "mismatch (same version)", [step for step, _ in matching], [value for _, value in matching], "red", dots=True
    )
    caption = (
        "Engine against trainer, a token. Red, at equal weights, is numeric error alone: about 1e-6 in fp32, 1e-2 in bf16, "
        "and flat. Grey, after further steps, is the policy's real movement. Red rising is a bug or a router that flips."
    )
    return Figure("mismatch", "Engine-trainer mismatch", caption, plot.html() + _mismatch_table(run))


def _mismatch_table(run: RunFolder) -> str:
    names = {"mean_abs": "mean |diff|", "k1": "k1", "k3": "k3", "share_above_ln2": "above ln 2"}
    body = ""
    for kind in ("mismatch", "drift"):
        means = [mean(column(run.kind("step"), f"{kind}/{name}")) for name in names]
        cells = "".join(f"<td>{'-' if value is None else f'{value:.2g}'}</td>" for value in means)
        body += f"<tr><th>{kind}</th>{cells}</tr>"
    head = "".join(f"<th>{title}</th>" for title in names.values())
    return f'<table class="numbers"><tr><th>run mean</th>{head}</tr>{body}</table>'


def loss(run: RunFolder) -> Figure | None:
    return _of_steps(
        run,
        "loss",
        "Loss",
        "The policy-gradient surrogate. Its level means little, and it need not fall; look for jumps. "
        "(In supervised training it is the cross-entropy, and falls.)",
    )


def gradient(run: RunFolder) -> Figure | None:
    return _of_steps(
        run,
        "grad_norm",
        "Gradient norm",
        "Global norm before clipping. Spikes that the kernel should have damped, or a level far above the clipping norm, "
        "ask for a smaller learning rate.",
        log=True,
        level="optimizer.gradient_clip",
    )


def learning_rate(run: RunFolder) -> Figure | None:
    return _of_steps(run, "learning_rate", "Learning rate", "The schedule as it was applied.", include=(0.0,))


def _of_steps(
    run: RunFolder,
    name: str,
    title: str,
    caption: str,
    log: bool = False,
    level: str | None = None,
    include: tuple[float, ...] = (),
) -> Figure | None:
    rows = run.kind("step")
    values = column(rows, name)
    if not any(value is not None for value in values):
        return None
    y = log_axis(values) if log else linear_axis(values, include=include)
    plot = Plot(step_axis(run), y, f"{title} over steps")
    plot.line("", column(rows, "step"), values, "blue")
    limit = run.setting(level) if level else None
    if limit and plot.y.low <= limit <= plot.y.high:
        plot.level(float(limit), "orange")
    return Figure(name.replace("_", "-"), title, caption, plot.html())


def throughput(run: RunFolder) -> Figure | None:
    rollouts, steps = run.kind("rollout"), run.kind("step")
    generated = column(rollouts, "speed/generated_tokens_per_second")
    trained = column(steps, "speed/trained_tokens_per_second")
    if not any(value is not None for value in [*generated, *trained]):
        return None
    y = linear_axis([*generated, *trained], "tokens/s", include=[0.0])
    plot = Plot(step_axis(run), y, "tokens per second over steps")
    plot.line("generated", column(rollouts, "step"), generated, "blue")
    plot.line("trained", column(steps, "step"), trained, "green")
    caption = (
        "Response tokens a second while generating, and while training. A slope usually follows the response length."
    )
    return Figure("throughput", "Throughput", caption, plot.html())


def age_groups(staleness: list) -> list[tuple[str, str, set[int]]]:
    """Staleness values in at most six groups, each with a label and the colour of its age, youngest first."""
    ages = sorted({int(value) for value in staleness if isinstance(value, (int, float))})
    if len(ages) <= 6:
        bands = [[age] for age in ages]
    else:
        bounds = [round(index * len(ages) / 6) for index in range(7)]
        bands = [ages[start:end] for start, end in pairwise(bounds)]
    groups = []
    for index, band in enumerate(bands):
        colour = f"age{round(index * 5 / max(1, len(bands) - 1))}"
        label = str(band[0]) if len(band) == 1 else f"{band[0]}-{band[-1]}"
        groups.append((label, colour, set(band)))
    return groups


Maker = Callable[[RunFolder], Figure | None]
LEARNING: tuple[Maker, ...] = (learning, length, signal, entropy)
CORRECTION: tuple[Maker, ...] = (ages, log_weight, phi, sample_size, mismatch)
COST: tuple[Maker, ...] = (throughput, loss, gradient, learning_rate)
