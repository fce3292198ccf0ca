"""Runs of consecutive numbers, which are copied at once."""

from collections.abc import Iterable


def runs(numbers: Iterable[int]) -> list[tuple[int, slice]]:
    """Numbers, in their order, as (place of the first among `numbers`, slice of the numbers): 3 4 7 are 3:5 and 7:8."""
    found: list[tuple[int, slice]] = []
    for place, number in enumerate(numbers):
        if found and found[-1][1].stop == number:
            first, run = found[-1]
            found[-1] = first, slice(run.start, number + 1)
        else:
            found.append((place, slice(number, number + 1)))
    return found
