"""How the console's state looks: a panel for a terminal, single lines for a log."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_vespo.observability.console_state import RunState, clock_text

BLOCKS = "▁▂▃▄▅▆▇█"
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
LABEL_WIDTH = 14
WIDEST = 132


def render(state: RunState, width: int) -> RenderableType:
    """The whole view, for a terminal of `width` columns."""
    width = min(width, WIDEST)
    inside = width - 4
    parts = [_phase_line(state, inside), _steps_line(state, inside), Text(""), _measurements(state, inside)]
    return Panel(
        Group(*parts),
        title=Text.assemble(("megatron-vespo", "bold"), f"  {state.title}"),
        title_align="left",
        subtitle=_times(state),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="red" if state.ended in ("stopped", "interrupted") else "green" if state.ended else "blue",
        width=width,
        padding=(0, 1),
    )


def progress_text(state: RunState) -> str:
    """What goes on right now, in words: "generating: 37/64 groups, 4,210 tokens (12 s)"."""
    counter = ""
    if state.done is not None:
        of = f"/{state.total:,.10g}" if state.total else ""
        counter = f": {state.done:,.10g}{of} {state.unit}"
    note = f", {state.note}" if state.note else ""
    return f"{state.phase}{counter}{note} ({state.phase_elapsed:.0f} s)"


def row_text(row: dict[str, Any], state: RunState) -> str:
    """A metrics row as one line; empty for rows that need none."""
    match row["kind"]:
        case "rollout":
            return (
                f"batch {number(row.get('batch'), '.0f')}: reward {number(row.get('reward/mean'), '.3f')}, "
                f"response {number(row.get('response/length_mean'), '.1f')} tokens "
                f"({number(row.get('response/truncated_share'), '.0%')} cut), "
                f"{number(row.get('speed/generated_tokens_per_second'), ',.0f')} tokens/s"
                + (f", {agreement_text(agreed)}" if (agreed := row.get("routing_probe/same_set")) is not None else "")
            )
        case "step":
            return _step_text(row, state)
        case "sync":
            verified = ", verified" if row.get("verified") else ""
            return (
                f"weights: version {row.get('weight_version')}, {(row.get('bytes') or 0) / 1e6:,.1f} MB in "
                f"{number(row.get('time/sync'), '.2f')} s{verified}"
            )
        case "evaluation":
            return (
                f"evaluation {row.get('when', '')}: accuracy {number(row.get('accuracy'), '.3f')} on "
                f"{row.get('prompts')} prompts, response {number(row.get('response/length_mean'), '.1f')} tokens"
            )
        case "mismatch":
            agreed = row.get("routing_probe/same_set")
            return f"engine and trainer at equal weights: mismatch {number(row.get('mismatch/mean_abs'), '.1e')}" + (
                f", {agreement_text(agreed)}" if agreed is not None else ""
            )
        case "phase":
            return f"{row.get('phase')}: {number(row.get('time/seconds'), '.1f')} s"
    return ""


def _step_text(row: dict[str, Any], state: RunState) -> str:
    parts = [
        f"step {row['step']}/{state.total_steps}: loss {number(row.get('loss'), '.4f')}",
        f"gradient {number(row.get('grad_norm'), '.3g')}",
    ]
    if row.get("log_weight/p50") is not None:
        quantiles = "/".join(number(row.get(f"log_weight/{name}"), ".2f") for name in ("p01", "p50", "p99"))
        parts += [f"log W p1/p50/p99 {quantiles}", f"phi {number(row.get('phi/mean'), '.2f')}"]
        parts += [f"sample size {number(row.get('ess'), '.0%')}"]
    for name in ("mismatch", "drift"):
        if row.get(f"{name}/mean_abs") is not None:
            parts.append(f"{name} {row[f'{name}/mean_abs']:.1e}")
    if row.get("routing/same_set") is not None:
        parts.append(agreement_text(row["routing/same_set"]))
    if (left := state.seconds_left) is not None:
        parts.append(f"{clock_text(left)} left")
    return ", ".join(parts)


def agreement_text(share: float) -> str:
    """Of recorded routes and the trainer's own choice."""
    return f"experts agree {share:.1%}"


def number(value: Any, form: str) -> str:
    """A number in a format, or a dash where there is none."""
    return format(value, form) if isinstance(value, (int, float)) else "-"


def sparkline(values: Iterable[float], width: int) -> str:
    """The last values as blocks, at most `width` wide (neighbours averaged), scaled from least to largest."""
    values = list(values)
    if len(values) < 2:
        return ""
    per_block = -(-len(values) // width)
    groups = [values[start : start + per_block] for start in range(0, len(values), per_block)]
    means = [sum(group) / len(group) for group in groups]
    low, span = min(means), max(means) - min(means)
    if not span < float("inf"):
        return ""
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1)) if span else 0] for mean in means)


def _times(state: RunState) -> Text:
    text = Text.assemble((clock_text(state.elapsed), "bold"), " elapsed")
    left = state.seconds_left
    if left is not None:
        text.append("  ")
        text.append(clock_text(left), "bold")
        text.append(" left")
    return text


def _phase_line(state: RunState, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(width=1)
    line.add_column(ratio=1, no_wrap=True)
    line.add_column(width=min(24, width // 4))
    if state.ended:
        mark = Text("✔", "green") if state.ended == "done" else Text("✘", "red")
        line.add_row(mark, Text(f"{state.ended} while {state.phase}" if state.ended != "done" else "done", "bold"), "")
        return line
    name, _, rest = progress_text(state).partition(state.phase)
    text = Text.assemble(name, (state.phase, "bold cyan"), rest)
    bar = ProgressBar(total=state.total, completed=state.done or 0, complete_style="cyan") if state.total else ""
    line.add_row(Text(SPINNER[int(state.elapsed * 4) % len(SPINNER)], "cyan"), text, bar)
    return line


def _steps_line(state: RunState, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(width=1)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    share = state.step / max(1, state.total_steps)
    bar = ProgressBar(
        total=max(1, state.total_steps), completed=state.step, complete_style="blue", finished_style="green"
    )
    line.add_row("", Text.assemble("step ", (f"{state.step}", "bold"), f"/{state.total_steps}"), bar, f"{share:.0%}")
    return line


@dataclass(frozen=True)
class _Line:
    """A label, its content as texts with their styles, and whose history of `RunState.histories` is drawn beside it."""

    label: str
    content: Sequence[str | tuple[str, str]]
    history: str = ""


def _measurements(state: RunState, width: int) -> RenderableType:
    spark = 14 if width < 100 else 36
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=LABEL_WIDTH, style="dim", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(width=spark, style="cyan", no_wrap=True, justify="right")
    rollout, step = state.last.get("rollout", {}), state.last.get("step", {})
    lines = [
        *_of_responses(rollout),
        *_of_weights(step, width),
        _of_differences(step, state.last.get("mismatch", {})),
        _of_speed(rollout, step),
        _Line("accuracy", _accuracy(state)),
    ]
    for line in lines:
        text = Text.assemble(*line.content)
        drawn = sparkline(state.histories.get(line.history, ()), spark)
        table.add_row(line.label, text if text.plain else Text("-", "dim"), drawn)
    return table


def _of_responses(rollout: dict[str, Any]) -> list[_Line]:
    reward = (
        _if(rollout.get("reward/mean"), "{:.3f}", bold=True),
        _if(rollout.get("reward/groups_without_variance"), "  {:.0%} of groups all alike"),
    )
    response = (
        _if(rollout.get("response/length_mean"), "{:.1f}", bold=True),
        _if(rollout.get("response/length_mean"), " tokens"),
        _if(rollout.get("response/length_p10"), "  p10 {:.0f}"),
        _if(rollout.get("response/length_p90"), "  p90 {:.0f}"),
        _if(rollout.get("response/truncated_share"), "  cut {:.0%}"),
    )
    return [
        _Line("reward", reward, "rollout/reward/mean"),
        _Line("response", response, "rollout/response/length_mean"),
    ]


def _of_weights(step: dict[str, Any], width: int) -> list[_Line]:
    names = ("p01", "p10", "p50", "p90", "p99") if width >= 100 else ("p01", "p50", "p99")
    log_weight = (
        *(_if(step.get(f"log_weight/{name}"), f"p{int(name[1:])} {{:+.2f}}  ", bold=name == "p50") for name in names),
        _if(step.get("log_weight/std"), "std {:.2f}"),
    )
    phi = (
        _if(step.get("phi/mean"), "{:.2f}", bold=True),
        _if(step.get("phi/p10"), "  p10 {:.2f}"),
        _if(step.get("phi/p90"), "  p90 {:.2f}"),
        _if(step.get("phi/share_below_0.01"), "  below 0.01: {:.1%}"),
    )
    sample_size = (_if(step.get("ess"), "{:.0%}", bold=True), _if(step.get("ess"), " effective"))
    return [
        _Line("log W", log_weight, "step/log_weight/std"),
        _Line("phi", phi),
        _Line("sample size", sample_size, "step/ess"),
    ]


def _of_differences(step: dict[str, Any], probe: dict[str, Any]) -> _Line:
    """`probe`: the last row of an asynchronous run's comparison at equal weights, which its steps hardly ever have."""
    mismatch = {**step, **probe}.get("mismatch/mean_abs")
    return _Line(
        "engine/trainer",
        (
            _if(mismatch, "{:.1e}", bold=True),
            _if(mismatch, " |log-prob diff|"),
            _if(step.get("drift/mean_abs"), "  drift {:.1e}"),
            _if(step.get("routing/same_set"), "  experts agree {:.1%}"),
        ),
    )


def _of_speed(rollout: dict[str, Any], step: dict[str, Any]) -> _Line:
    generated, trained = (
        row.get(f"speed/{name}_tokens_per_second") for row, name in ((rollout, "generated"), (step, "trained"))
    )
    return _Line(
        "tokens/s",
        (
            _if(generated, "{:,.0f}", bold=True),
            _if(generated, " generated  "),
            _if(trained, "{:,.0f}", bold=True),
            _if(trained, " trained"),
        ),
    )


def _if(value: Any, form: str, bold: bool = False) -> tuple[str, str]:
    """A measured number in its words; nothing where it was not measured."""
    return (form.format(value) if isinstance(value, (int, float)) else "", "bold" if bold else "")


def _accuracy(state: RunState) -> list[Any]:
    if not state.evaluations:
        return []
    first, last = state.evaluations[0], state.evaluations[-1]
    parts: list[Any] = [(number(first.get("accuracy"), ".3f"), "bold"), f" at step {first['step']}"]
    if last is not first:
        parts += ["  →  ", (number(last.get("accuracy"), ".3f"), "bold green"), f" at step {last['step']}"]
    return parts
