"""Reads the files of runs that wandb itself has written: its library can write and upload them, and not read them.

A file is a header of 7 bytes and then LevelDB's log format: blocks of 32 KiB, in them chunks with a checksum (4 bytes), a
length (2) and a kind (1: a whole record, 2 to 4: the first, a middle, the last part of one). A record is wandb's own
protocol buffer. https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def of_kind(path: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def rows(path: Path) -> list[dict[str, Any]]:
    """Of the history, in order; what is nested there ("a", "b") is {"a": {"b": ...}} here."""
    return [_nested(item for item in history.item) for history in of_kind(path, "history")]


def _nested(items: Iterator[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inside = row
        for name in outer:
            inside = inside.setdefault(name, {})
        inside[last] = json.loads(item.value_json)
    return row


def parts(run_dir: Path) -> list[Path]:
    """The files of a run and of the parts that resumed it, the first first."""
    return sorted(run_dir.glob("wandb/*run-*/*.wandb"))
