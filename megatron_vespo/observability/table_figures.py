"""Figures of tables that compare: one for a run, their spread over a variant's runs, and how a cell shows it."""

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from megatron_vespo.observability.collapse import Points

NOT_SET = "–"


def mean_of(measured: Points) -> float | None:
    """None of nothing."""
    return mean(value for _, value in measured) if measured else None


def median_of(measured: Points) -> float | None:
    """None of nothing."""
    return median(value for _, value in measured) if measured else None


def spread_of(values: Sequence[float | None]) -> dict[str, Any]:
    """`mean`, `min`, `max` of the numbers there are (None of none), and `n`, how many."""
    there = [value for value in values if value is not None]
    ends = (mean(there), min(there), max(there)) if there else (None, None, None)
    return {**dict(zip(("mean", "min", "max"), ends, strict=True)), "n": len(there)}


def cell(spread: dict[str, Any], runs: int, form: Callable[[float], str]) -> tuple[str, str]:
    """(mean, what stands below it: least to largest if they look different, and of how many runs if not of all)."""
    if not spread["n"]:
        return NOT_SET, ""
    low, high = form(spread["min"]), form(spread["max"])
    below = [f"{low} to {high}"] if low != high else []
    below += [f"n {spread['n']} of {runs}"] if spread["n"] < runs else []
    return form(spread["mean"]), ", ".join(below)
