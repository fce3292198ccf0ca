"""Runs by their folders, wherever they are, on one page."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.config import ConfigError
from megatron_vespo.observability.comparison import NOT_COMPARED, write_comparison
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.run_folder import RunFolder, read_run

PAGE = "comparison.html"


def compare_runs(folders: Sequence[Path], page: Path | None = None) -> Path:
    """Write a page that compares runs; those that differ in nothing but the seed are one line with its spread.

    Args:
        page: None: comparison.html in the folder that holds them all.

    Raises:
        ConfigError: a folder is not a run's, or was given twice.
    """
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{place} was given twice")
    common = Path(os.path.commonpath([place.parent for place in places]))
    variants = _variants([read_run(place) for place in places], common)
    return write_comparison(page or common / PAGE, " / ".join(variant.name for variant in variants), variants)


def _variants(runs: Sequence[RunFolder], common: Path) -> list[Variant]:
    found: list[list[RunFolder]] = []
    for run in runs:
        for alike in found:
            if _compared(alike[0]) == _compared(run) != {}:
                alike.append(run)
                break
        else:
            found.append([run])
    return [Variant(_name([run.path.relative_to(common) for run in alike]), alike) for alike in found]


def _compared(run: RunFolder) -> dict:
    return {key: value for key, value in run.config.items() if key not in NOT_COMPARED}


def _name(paths: Sequence[Path]) -> str:
    """What the folders of a variant have in common, else the first of them."""
    first, *others = paths
    shared = [
        part
        for place, part in enumerate(first.parts)
        if all(path.parts[place : place + 1] == (part,) for path in others)
    ]
    return "/".join(shared) or str(first)
