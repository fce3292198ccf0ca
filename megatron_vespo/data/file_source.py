"""Questions from a .jsonl, .parquet or .csv file, one a row."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.config import ConfigError
from megatron_vespo.data.sources import Item
from megatron_vespo.errors import looked_in

SUFFIXES = (".jsonl", ".parquet", ".csv")


class FilePrompts:
    """Rows of a file, each epoch in another order. `reference` is the row as a dictionary."""

    def __init__(self, path: str, prompt_key: str, answer_key: str | None, seed: int, key: str):
        rows = read_rows(path, f"{key}.path")
        for number, row in enumerate(rows, start=1):
            check_row(row, number, path, prompt_key, answer_key)
        self.name = Path(path).stem
        self.size = len(rows)
        self._rows, self._prompt_key, self._seed = rows, prompt_key, seed
        self._epoch = -1
        self._order = np.arange(0)

    def item(self, index: int) -> Item:
        epoch, position = divmod(index, self.size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.size)
            self._epoch = epoch
        row = self._rows[self._order[position]]
        return Item(question=row[self._prompt_key], reference=row)


def read_rows(path: str | Path, key: str) -> list[dict[str, Any]]:
    """All rows of a .jsonl, .parquet or .csv file (its values are text).

    Raises:
        ConfigError: the file is missing, of another kind, empty or unreadable; a bad row is named by number, from 1.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{key}: {path}: no such file{looked_in(path)}")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{key}: {path}: is neither of {', '.join(SUFFIXES)}")
    try:
        rows = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path}: is not UTF-8 text: {error}") from None
    if not rows:
        raise ConfigError(f"{key}: {path}: has no rows")
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: row {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: row {number} is not an object but {type(row).__name__}")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: not readable as parquet: {error}") from None


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        try:
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise ConfigError(f"{path}: row {number} has not as many fields as the header")
                rows.append(row)
        except csv.Error as error:
            raise ConfigError(f"{path}: line {reader.line_num} is not CSV: {error}") from None
    return rows


def check_row(row: dict[str, Any], number: int, path: str | Path, prompt_key: str, answer_key: str | None) -> None:
    """Refuse a row without a usable question or answer, naming it."""
    for key in (prompt_key, answer_key):
        if key is not None and row.get(key) is None:
            found = ", ".join(row) or "none"
            raise ConfigError(f"{path}: row {number} has no '{key}' (its columns: {found})")
    question = row[prompt_key]
    if isinstance(question, str):
        if not question.strip():
            raise ConfigError(f"{path}: row {number}: '{prompt_key}' is empty")
        return
    if not isinstance(question, list) or not question or not all(_is_message(message) for message in question):
        raise ConfigError(
            f"{path}: row {number}: '{prompt_key}' is neither text nor a list of {{role, content}} messages"
        )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
