"""A grid of training runs: variants x values of settings x seeds."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator

from megatron_vespo.config.load import load_config
from megatron_vespo.config.run import TrainConfig
from megatron_vespo.config.section import Section
from megatron_vespo.errors import ConfigError

SETTLED_HERE = ("seed", "run_dir", "overwrite")
"""Keys of a run that the grid decides."""


def with_off(grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """YAML reads a bare `off` as false; the names of runs say what was meant."""
    key = "routing.replay"
    off = {key: tuple("off" if value is False else value for value in grid[key])} if key in grid else {}
    return grid | off


class VariantConfig(Section):
    config: str | None = None
    """Another configuration to start from than the grid's."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings, as key.path: value; over the grid's `set`."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values to try with this variant, by key.path; of a key that the grid has too, these are tried instead."""

    @field_validator("grid")
    @classmethod
    def _yaml_off(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        return with_off(grid)


class AblationConfig(Section):
    """`megatron-vespo ablate`."""

    title: str
    """Of the page."""
    config: str
    """Configuration of `megatron-vespo train` that every run starts from, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of all runs, as key.path: value."""
    variants: dict[str, VariantConfig] = Field(min_length=1)
    """By name. Each is trained with every combination of the grid's values."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values to try, by key.path."""
    seeds: tuple[PositiveInt, ...] = Field(default=(1, 2, 3), min_length=1)
    """Every variant is trained with each."""

    @field_validator("grid")
    @classmethod
    def _yaml_off(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        return with_off(grid)

    def own_problems(self) -> Iterator[tuple[str, str]]:
        grids = [("grid", self.grid)]
        grids += [(f"variants.{name}.grid", variant.grid) for name, variant in self.variants.items()]
        settings = [("set", self.set), *grids]
        settings += [(f"variants.{name}.set", variant.set) for name, variant in self.variants.items()]
        for where, keys in settings:
            for key in keys:
                if key in SETTLED_HERE:
                    yield f"{where}.{key}", "decided by the grid itself (`seeds`, --out): leave it out"
        for where, grid in grids:
            for key, values in grid.items():
                if not values:
                    yield f"{where}.{key}", "no values to try"
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", "a seed occurs twice"


@dataclass(frozen=True)
class PlannedRun:
    """`variant`: its name and the grid's values, as it is called in tables."""

    variant: str
    seed: int
    config: TrainConfig
    method: str = ""
    """The variant's name alone."""
    point: tuple[tuple[str, str], ...] = ()
    """The grid's values: (key.path, value as text)."""


def plan_runs(
    ablation: AblationConfig,
    file: Path,
    out: Path,
    overrides: list[str] | None = None,
    over: Path | None = None,
) -> list[PlannedRun]:
    """Every run of the grid, seed by seed, so that there is early something to compare. Runs are `out`/variant/seed_n.

    Args:
        file: where `ablation` was read; its paths are relative to it.
        overrides: of every run, over all that the grid says.
        over: a file of settings that is laid over the configuration of every run, under all that the grid sets.

    Raises:
        ConfigError: a run's configuration has mistakes; names the run. Or an override of what the grid decides.
    """
    for override in overrides or []:
        if (key := override.partition("=")[0]) in SETTLED_HERE:
            raise ConfigError(f"override '{override}': {key} is decided by the grid itself (`seeds` or --seed, --out)")
    planned = []
    for seed in ablation.seeds:
        for name, variant in ablation.variants.items():
            grid = ablation.grid | variant.grid
            for chosen in itertools.product(*grid.values()):
                values = dict(zip(grid, chosen, strict=True))
                called = ", ".join([name, *(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())])
                folder = out / re.sub(r"[^\w.=-]+", "_", called) / f"seed_{seed}"
                # a run that was interrupted starts again, so checkpoints would be of no use
                own = {"seed": seed, "run_dir": str(folder), "overwrite": True, "checkpoint.save_every": 0}
                settings = ablation.set | variant.set | values | own
                source = file.parent / (variant.config or ablation.config)
                try:
                    config = load_config(TrainConfig, source, overrides, settings, over)
                except ConfigError as error:
                    raise ConfigError(f"{file}: run '{called}', seed {seed}: {error}") from None
                point = tuple((key, str(value)) for key, value in values.items())
                planned.append(PlannedRun(called, seed, config, name, point))
    folders = [run.config.run_dir for run in planned]
    if len(set(folders)) < len(folders):
        raise ConfigError(
            f"{file}: two variants would share a folder: give them names that differ in letters or digits"
        )
    return planned
