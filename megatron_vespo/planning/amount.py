"""A number of bytes or seconds with the formula that gave it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """Of one thing.

    Attributes:
        value: bytes, or seconds.
        formula: with its numbers filled in, for `--explain`.
    """

    name: str
    value: float
    formula: str = ""


def total(amounts: Iterable[Amount]) -> float:
    return sum(amount.value for amount in amounts)
