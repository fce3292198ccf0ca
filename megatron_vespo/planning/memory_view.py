"""A plan of memory and time, for people and for programs."""

from collections.abc import Iterable

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from megatron_vespo.architecture.compute_cost import matrix_parameters_per_token
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.engine_memory import weight_bytes
from megatron_vespo.planning.layouts import why_worse
from megatron_vespo.planning.memory_plan import MemoryPlan
from megatron_vespo.planning.trainer_memory import TrainerMemory

GB = 1e9
SHOWN_LAYOUTS = 8
WIDTH = 100


def memory_figures(plan: MemoryPlan) -> dict:
    """For JSON. Bytes and seconds."""
    return {
        "model": plan.source,
        "fits": not plan.problems,
        "problems": plan.problems,
        "gpus_used": plan.gpus_used,
        "gpu": {"name": plan.machines.gpu.name, "memory": plan.machines.gpu_memory},
        "trainer": [
            {
                "stage": trainer.stage,
                "peak": round(trainer.peak),
                "phases": {name: _listed(amounts) for name, amounts in trainer.phases.items()},
            }
            for trainer in plan.trainers
        ],
        "margin": round(plan.own.margin),
        "engine": {
            "amounts": _listed(plan.engine.amounts),
            "cache_tokens": plan.engine.cache_tokens,
            "requests_at_longest": plan.engine.at_longest,
            "requests_at_half": plan.engine.at_mean,
            "host_routes": plan.engine.routes.value,
        },
        "host": _listed(plan.host),
        "step_seconds": round(plan.step_seconds, 3),
        "seconds": {name: _listed(amounts) for name, amounts in plan.times.items()},
        "layouts": [
            {
                "name": candidate.name,
                "layout": candidate.layout.model_dump(mode="json"),
                "fits": candidate.fits,
                "peak": round(candidate.peak),
                "seconds": round(candidate.seconds, 3),
                "why": why_worse(candidate, plan.layouts[0]),
            }
            for candidate in plan.layouts
        ],
    }


def _listed(amounts: Iterable[Amount]) -> list[dict]:
    return [{"name": a.name, "value": a.value, "formula": a.formula} for a in amounts]


def print_plan(plan: MemoryPlan, explain: bool) -> None:
    console = Console(highlight=False, soft_wrap=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(_heading(plan))
    console.print(_trainer_table(plan.trainers))
    console.print(Group(_engine_table(plan), _host_table(plan)))
    console.print(_time_table(plan))
    console.print(_layout_table(plan))
    if explain:
        _print_formulas(console, plan)
    console.print(_verdict(plan))


def _heading(plan: MemoryPlan) -> Text:
    a, machines, policy = plan.architecture, plan.machines, plan.config.policy
    engine = plan.config.rollout.engine
    parameters, active = weight_bytes(a, 1, 1), matrix_parameters_per_token(a)
    recompute = policy.recompute.granularity
    there = plan.gpus_used if machines.gpus is None else machines.gpus
    return Text(
        f"model    {plan.source}: {_count(parameters)} parameters, {_count(active)} of them work on a token\n"
        f"trainer  {policy.ranks} ranks: {plan.own.name}, recompute {recompute}, up to "
        f"{plan.trainers[0].positions:,} positions a micro-batch\n"
        f"engines  {engine.count} of {engine.tensor_parallel} GPU{'s' * (engine.tensor_parallel > 1)}\n"
        f"GPUs     {plan.gpus_used} of {there} {machines.gpu.name} with {machines.gpu_memory / GB:g} GB, "
        f"{machines.gpus_per_node} a node\n"
        f"step     {plan.work.sequences:,} sequences of {plan.work.prompt:,.0f} + {plan.work.response:,.0f} tokens on average"
    )


def _titled(title: str, table: Table) -> Group:
    """A table's own title would be folded to the table's width."""
    return Group(Text(f"\n{title}", style="bold"), table)


def _table(*columns: str, text_last: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        left = number == 0 or (text_last and number == len(columns) - 1)
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    return table


def _trainer_table(trainers: list[TrainerMemory]) -> Group:
    trainer = max(trainers, key=lambda t: t.peak)
    phases = trainer.phases
    which = "" if len(trainers) == 1 else f", of pipeline stage {trainer.stage}, the fullest"
    table = _table("", *phases)
    names = dict.fromkeys(amount.name for amounts in phases.values() for amount in amounts)
    for name in sorted(names, key=lambda name: name == "fragmentation"):
        cells = [next((a.value for a in amounts if a.name == name), None) for amounts in phases.values()]
        table.add_row(name, *("" if value is None else _gigabytes(value) for value in cells))
    table.add_row("total", *(f"{total(amounts) / GB:.2f}" for amounts in phases.values()), style="bold")
    return _titled(f"GB on a trainer's GPU{which}", table)


def _engine_table(plan: MemoryPlan) -> Group:
    engine = plan.engine
    table = _table("", "", "", text_last=True)
    for amount in engine.amounts:
        table.add_row(amount.name, _gigabytes(amount.value), "")
    table.add_row("total", f"{engine.peak / GB:.2f}", "", style="bold")
    table.add_row(
        "at once",
        f"{engine.at_longest:,}",
        f"requests an engine at full length, {engine.at_mean:,} at half; its cache holds {engine.cache_tokens:,} tokens",
    )
    return _titled("GB on an engine's GPU", table)


def _host_table(plan: MemoryPlan) -> Group:
    table = _table("", "")
    for amount in plan.host:
        table.add_row(amount.name, f"{amount.value / GB:.1f}")
    table.add_row("total", f"{total(plan.host) / GB:.1f} of {plan.machines.host_memory / GB:,.0f}", style="bold")
    return _titled("GB of a node's host memory, at most (with trainers, engines and the driver on it)", table)


def _time_table(plan: MemoryPlan) -> Group:
    table = _table("", "", "", text_last=True)
    for phase, amounts in plan.times.items():
        parts = ", ".join(f"{a.name} {a.value:.1f}" for a in amounts if a.value >= 0.05) if len(amounts) > 1 else ""
        table.add_row(phase, _seconds(total(amounts)), parts)
    synchronous = plan.config.algorithm.asynchronous is None
    how = "one after the other" if synchronous else "generation beside the rest"
    table.add_row("step", _seconds(plan.step_seconds), how, style="bold")
    return _titled("Seconds of an optimizer step (estimates)", table)


def _layout_table(plan: MemoryPlan) -> Group:
    best = plan.layouts[0]
    table = _table("", "GB", "s to train", "against the first", text_last=True)
    shown = plan.layouts[:SHOWN_LAYOUTS]
    own = next((candidate for candidate in plan.layouts if candidate.layout == plan.own.layout), plan.own)
    for candidate in shown if own in shown else [*shown, own]:
        mine = candidate is own
        table.add_row(
            candidate.name + (" (this one)" if mine else ""),
            f"{candidate.peak / GB:.1f}",
            _seconds(candidate.seconds),
            why_worse(candidate, best),
            style="bold" if mine else None,
        )
    return _titled(f"Layouts of {plan.config.policy.ranks} ranks, best of {len(plan.layouts)} first", table)


def _print_formulas(console: Console, plan: MemoryPlan) -> None:
    for trainer in plan.trainers:
        for phase, amounts in trainer.phases.items():
            own = amounts if phase == "train" else [a for a in amounts if a not in trainer.always]
            _print_amounts(console, f"trainer, stage {trainer.stage}, {phase}", own, GB, "GB")
    _print_amounts(console, "engine", [*plan.engine.amounts, plan.engine.routes], GB, "GB")
    _print_amounts(console, "host", plan.host, GB, "GB")
    for phase, amounts in plan.times.items():
        _print_amounts(console, f"time, {phase}", amounts, 1.0, "s")


def _print_amounts(console: Console, title: str, amounts: list[Amount], unit: float, name: str) -> None:
    if not amounts:
        return
    console.print(Text(f"\n{title}", style="bold"))
    for amount in amounts:
        console.print(Text(f"  {amount.name} = {amount.value / unit:.3f} {name}"))
        for part in amount.formula.split("; "):
            console.print(Text(f"      {part}", style="dim"))


def _verdict(plan: MemoryPlan) -> Text:
    if plan.problems:
        return Text("\ndoes not fit\n" + "\n".join(f"  {problem}" for problem in plan.problems), style="bold red")
    memory = plan.machines.gpu_memory
    worst = max(trainer.peak for trainer in plan.trainers)
    return Text(
        f"\nfits: a trainer's GPU keeps {plan.own.margin / GB:.1f} of {memory / GB:g} GB free ({1 - worst / memory:.0%}), an "
        f"engine's {(memory - plan.engine.peak) / GB:.1f} GB",
        style="bold green",
    )


def _gigabytes(value: float) -> str:
    return "<0.01" if 0 < value < 0.005 * GB else f"{value / GB:.2f}"


def _seconds(value: float) -> str:
    return "<0.1" if 0 < value < 0.05 else f"{value:.1f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"
