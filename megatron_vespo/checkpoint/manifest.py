"""What a conversion read and wrote: name, shape, dtype and hash of every tensor, in the output's manifest.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_vespo.config import ConfigError

MANIFEST_FILE = "manifest.json"
HASH = "xxh3_128"
"""Finds damage, at memory's speed; it is no proof against somebody who means to forge a tensor."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of the source or the target; of a torch_dist checkpoint, a piece of one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch spells it, without "torch."."""
    hash: str
    """Of its bytes in row-major order, little-endian."""
    file: str
    offset: tuple[int, ...] | None = None
    """Of a piece: where it begins in its tensor."""


class TensorHash:
    """Of one tensor, row block by row block."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, tensor: Tensor) -> None:
        self._state.update(as_bytes(tensor))

    def hexdigest(self) -> str:
        return self._state.hexdigest()


def hash_of(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor))


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_manifest(
    folder: Path, plan: dict[str, Any], source: Iterable[TensorRecord], target: Iterable[TensorRecord]
) -> None:
    """`plan`: what was converted and how."""
    content = {"plan": plan, "hash": HASH}
    content |= {"source": [asdict(record) for record in source], "target": [asdict(record) for record in target]}
    (folder / MANIFEST_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_plan(folder: Path) -> Any:
    """The plan of the conversion that made `folder`; None if no conversion has finished there."""
    try:
        return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def piece_hashes(folder: Path) -> dict[tuple[str, tuple[int, ...]], str]:
    """(key, offset) -> hash of every piece of a converted checkpoint; empty if no manifest came with it.

    Raises:
        ConfigError: the manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["target"]
        return {(record["name"], tuple(record["offset"])): record["hash"] for record in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}; remove it to go without") from None
