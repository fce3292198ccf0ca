"""Train a grid of runs with and without routing replay, and say what it changed, in figures and on a page.

python tools/routing_replay_ablation.py --config examples/lab/routing_replay.yaml --out runs/routing_replay
python tools/routing_replay_ablation.py --config examples/lab/router_noise.yaml --out runs/router_noise --seed 1

The grid is one of `megatron-vespo ablate`, and is trained like it: the same command goes on where it was stopped.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_vespo.cli import exit_code
from megatron_vespo.config import AblationConfig, ConfigError, load_config, plan_runs
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.routing_comparison import (
    COLUMNS,
    write_routing_comparison,
    write_routing_figures,
)

FIGURES = "ablation.json"
PAGE = "routing.html"
LEFT_TO_THE_PAGE = ("accuracy_before", "share_above_ln2_native", "share_above_ln2_replayed")
TABLE_WIDTH = 170

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    config: Annotated[Path, typer.Option(help="YAML with variants, values and seeds (AblationConfig).")],
    out: Annotated[Path, typer.Option(help="Folder of the runs, of ablation.json and of the pages.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of every run, as key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Instead of the grid's seeds; repeatable.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Start no further run after so many minutes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
) -> None:
    """Train a grid of runs with and without routing replay, and say what it changed, in figures and on a page."""
    settings = load_config(AblationConfig, config, settings={"seeds": seeds} if seeds else None)
    planned = plan_runs(settings, config, out, overrides)
    if silent := [run.variant for run in planned if not run.config.routing.engine_records]:
        raise ConfigError(
            f"{config}: nothing is measured in '{silent[0]}', which records no routes of the engine: put "
            "`routing.record: true` under `set`"
        )
    if dry_run:
        print("\n".join(run.config.run_dir for run in planned))
        return
    from megatron_vespo.orchestration.ablation import PAGE as LEARNING_PAGE
    from megatron_vespo.orchestration.ablation import run_ablation

    def also(variants: list[Variant]) -> None:
        write_routing_figures(out / FIGURES, settings.title, variants)
        write_routing_comparison(out / PAGE, settings.title, variants, more=LEARNING_PAGE)

    print(run_ablation(settings.title, planned, out, minutes, also))
    console = Console()
    console = Console(width=max(console.width, TABLE_WIDTH))
    console.print(table(json.loads((out / FIGURES).read_text())["variants"]))
    print(f"routing      {out / PAGE}\nfigures      {out / FIGURES}")


def table(rows: list[dict[str, Any]]) -> Table:
    """Means over seeds."""
    columns = [column for column in COLUMNS if column[0] not in LEFT_TO_THE_PAGE]
    drawn = Table(title="Means over seeds", title_justify="left")
    drawn.add_column("", no_wrap=True)
    for _, heading, _ in columns:
        drawn.add_column("accuracy" if heading == "after" else heading, justify="right")
    for row in rows:
        means = [(row[name]["mean"], form) for name, _, form in columns]
        drawn.add_row(row["name"], *("-" if value is None else form(value) for value, form in means))
    return drawn


if __name__ == "__main__":
    sys.exit(exit_code(app))
