"""The splits of a plan, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megatron_vespo.config.planning import RatesConfig
from megatron_vespo.planning.split import Lengths, Row, recommended

TABLE_WIDTH = 120


def split_figures(rates: RatesConfig, lengths: Lengths, rows: Sequence[Row]) -> dict:
    """For JSON."""
    return {
        "rates": rates.model_dump(mode="json"),
        "lengths": asdict(lengths),
        "recommended": recommended(rows).figures(),
        "splits": [row.figures() for row in rows],
    }


def print_split(rates: RatesConfig, lengths: Lengths, rows: Sequence[Row]) -> None:
    console, best = Console(highlight=False), recommended(rows)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(f"speeds      {rates.about}")
    console.print(
        f"lengths     prompts of {lengths.prompt} tokens; responses lognormal, median {lengths.median:g}, sigma "
        f"{lengths.sigma:g}, cut at {lengths.longest}"
    )
    table = Table("GPUs that sample", "that train", "max staleness", "s a step", "trajectories/s", "tokens/s")
    for name in ("sampling", "at full speed", "training", "mean staleness"):
        table.add_column(name)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        outcome = row.outcome
        table.add_row(
            f"{row.rollout_gpus}",
            f"{row.train_gpus}",
            "synchronous" if row.max_staleness is None else f"{row.max_staleness}",
            f"{row.step_seconds:.1f}",
            f"{row.trajectories_per_second:.2f}",
            f"{row.tokens_per_second:,.0f}",
            f"{outcome.generation:.0%}",
            f"{outcome.generation_speed:.0%}",
            f"{outcome.training:.0%}",
            f"{row.mean_staleness:.1f}",
            style="bold" if row is best else None,
        )
    console.print(table)
    bound = "the synchronous loop" if best.max_staleness is None else f"max_staleness {best.max_staleness}"
    console.print(f"recommended: {best.rollout_gpus} GPUs sample, {best.train_gpus} train, with {bound}")
    console.print(
        "sampling and training: share of the time in which engines decode and the trainer trains; at full speed: tokens "
        "as a share of what full engines would sample"
    )
