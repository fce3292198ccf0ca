"""How a grid of variants is laid out: lines of charts, panels side by side, and a table of methods by values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vespo.observability.run_folder import RunFolder

FEW = 4
"""Up to so many variants are drawn in one panel, and single runs are shown from the start."""


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but the seed, and what they are called together."""

    name: str
    runs: list[RunFolder]
    method: str = ""
    """Of a grid: the variant's name there, without the grid's values."""
    point: tuple[tuple[str, str], ...] = ()
    """Of a grid: its values, as (key.path, text)."""


@dataclass(frozen=True)
class Panel:
    """Variants that are drawn in one chart. `lines`: which line of the legend each is."""

    title: str
    variants: list[Variant]
    lines: list[int]


@dataclass(frozen=True)
class Arrangement:
    """`lines`: what the legend names, each with a colour of its own."""

    lines: list[str]
    panels: list[Panel]

    def line_of(self, variant: Variant) -> int:
        return next(
            line
            for panel in self.panels
            for one, line in zip(panel.variants, panel.lines, strict=True)
            if one is variant
        )


def arranged(variants: Sequence[Variant]) -> Arrangement:
    """A panel for each point of the grid and a line for each method, where there are several of both and many variants;
    else one panel with a line for each variant."""
    methods = list(dict.fromkeys(variant.method for variant in variants))
    points = list(dict.fromkeys(variant.point for variant in variants))
    if len(variants) <= FEW or len(methods) < 2 or len(points) < 2:
        return Arrangement([variant.name for variant in variants], [Panel("", [*variants], [*range(len(variants))])])
    panels = []
    for point in points:
        there = [variant for variant in variants if variant.point == point]
        panels.append(Panel(named(point), there, [methods.index(variant.method) for variant in there]))
    return Arrangement(methods, panels)


def named(point: Sequence[tuple[str, str]]) -> str:
    """ "staleness=16, learning_rate=0.0001"."""
    return ", ".join(f"{last_of(key)}={value}" for key, value in point)


def last_of(key: str) -> str:
    return key.rpartition(".")[2]


@dataclass(frozen=True)
class GridTable:
    """`axis`: the key whose values are the columns. `lines`: (name, the row of `comparison_rows` at each column)."""

    axis: str
    columns: list[str]
    lines: list[tuple[str, list[Mapping[str, Any] | None]]]


def grid_table(rows: Sequence[Mapping[str, Any]]) -> GridTable | None:
    """Rows of `comparison_rows` with the grid's last axis across, numbers in their order, methods and other axes down.

    None where there is nothing to lay across: no grid, or one of a single value.
    """
    axis = next(reversed(rows[0]["point"]), None) if rows else None
    if axis is None or any(next(reversed(row["point"]), None) != axis for row in rows):
        return None
    columns = _in_order(dict.fromkeys(row["point"][axis] for row in rows))
    if len(columns) < 2:
        return None
    lines: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        others = [(key, value) for key, value in row["point"].items() if key != axis]
        name = ", ".join(text for text in (row["method"], named(others)) if text)
        lines.setdefault(name, {})[row["point"][axis]] = row
    return GridTable(axis, columns, [(name, [at.get(value) for value in columns]) for name, at in lines.items()])


def _in_order(values: Iterable[str]) -> list[str]:
    found = list(values)
    try:
        return sorted(found, key=float)
    except ValueError:
        return found
