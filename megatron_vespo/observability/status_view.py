"""`megatron-vespo status` on a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_vespo.observability.status import RunStatus

COLORS = {
    "running": "green",
    "finished": "green",
    "alive": "green",
    "stopped": "bold red",
    "gone": "bold red",
    "failed": "bold red",
    "driver gone": "bold red",
}


def view(status: RunStatus) -> RenderableType:
    parts: list[RenderableType] = [headline(status)]
    if status.parts:
        parts += ["", table_of_parts(status)]
    if status.waits:
        parts += ["", table_of_waits(status)]
    return Group(*parts)


def headline(status: RunStatus) -> Text:
    text = Text(f"{status.run_dir}: ").append(status.state, COLORS.get(status.state, "yellow"))
    if status.step is not None or status.steps is not None:
        text.append(f", step {status.step or 0} of {status.steps or '?'}")
    if status.last_step_seconds_ago is not None:
        text.append(f", the last {duration(status.last_step_seconds_ago)} ago")
    if status.message:
        text.append(f"\n{status.message}")
    return text


def table_of_parts(status: RunStatus) -> Table:
    several = len({part.host for part in status.parts}) > 1
    table = _table("process", *(["node"] if several else []), "pid", "state")
    for part in status.parts:
        where = [part.host] if several else []
        table.add_row(part.name, *where, str(part.pid), Text(part.state, COLORS.get(part.state, "yellow")))
    return table


def table_of_waits(status: RunStatus) -> Table:
    table = _table("waits for", "of", "since", "deadline")
    for wait in status.waits:
        late = wait.seconds > wait.deadline_seconds
        table.add_row(
            wait.what,
            ", ".join(wait.owners) or "-",
            Text(duration(wait.seconds), "bold red" if late else ""),
            duration(wait.deadline_seconds),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name)
    return table


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
