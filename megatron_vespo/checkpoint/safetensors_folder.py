"""The tensors of a Hugging Face folder: names, shapes and dtypes from the headers alone, then one tensor at a time.

One model.safetensors, or shards with model.safetensors.index.json. Reading headers needs no torch.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megatron_vespo.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, F16, ..."""
    file: Path


@dataclass
class Headers:
    """What the headers of a folder say, and what is wrong with its files."""

    tensors: dict[str, TensorHeader] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    """Tensors that the index puts into a file that is missing or damaged."""
    problems: list[str] = field(default_factory=list)


def read_headers(folder: str | Path) -> Headers:
    """Read the header of every safetensors file of `folder`; problems of single files are collected, not raised.

    Raises:
        ConfigError: no safetensors at all, both forms at once, or an index that can't be read.
    """
    folder = Path(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise ConfigError(f"{folder}: both {SINGLE_FILE} and {INDEX_FILE} are here; remove the one that is out of date")
    headers = Headers()
    if single.exists():
        _read_file(single, headers)
        return headers
    if not index.exists():
        raise ConfigError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} in this folder; only safetensors are read")
    placed = _read_index(index)
    for name in sorted(set(placed.values())):
        expected = {tensor for tensor, file in placed.items() if file == name}
        found = _read_file(folder / name, headers)
        if found is None:
            headers.unreadable |= expected
            continue
        absent = sorted(expected - found)
        headers.unreadable.update(absent)
        headers.problems += [f"{name}: does not hold {tensor}, which {INDEX_FILE} puts there" for tensor in absent]
        headers.problems += [
            f"{name}: holds {tensor}, which {INDEX_FILE} does not name" for tensor in sorted(found - expected)
        ]
    return headers


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name."""
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: has no weight_map") from None
    if not isinstance(placed, dict) or not placed:
        raise ConfigError(f"{path}: weight_map is not a mapping of tensors to files")
    for file in placed.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{path}: weight_map names {file!r}, which is not the name of a file in this folder")
    return placed


def _read_file(path: Path, headers: Headers) -> set[str] | None:
    """Add one file's tensors; their names, or None (and a problem) if it can't be read."""
    try:
        path.open("rb").close()  # safetensors calls a file missing that may not be read
        with safe_open(path, framework="numpy") as file:
            found = set(file.keys())
            for name in found:
                header = file.get_slice(name)
                if name in headers.tensors:
                    headers.problems.append(
                        f"{path.name}: holds {name}, which {headers.tensors[name].file.name} holds too"
                    )
                headers.tensors[name] = TensorHeader(tuple(header.get_shape()), header.get_dtype(), path)
    except FileNotFoundError:
        headers.problems.append(f"{path.name}: missing")
        return None
    except PermissionError as error:
        headers.problems.append(f"{path.name}: can't be read: {error.strerror}")
        return None
    except (SafetensorError, OSError) as error:
        headers.problems.append(f"{path.name}: truncated or damaged: {error}")
        return None
    return found


class TensorReader:
    """Reads tensors one at a time, memory-mapped, onto the CPU. Keeps files open until it is closed."""

    def __init__(self, tensors: dict[str, TensorHeader]):
        self._tensors = tensors
        self._files: dict[Path, Any] = {}

    def read(self, name: str, cut: tuple[slice, ...] = ()) -> "Tensor":
        """The tensor, or what `cut` selects of it (one slice for each dimension, from the first on)."""
        path = self._tensors[name].file
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt", device="cpu")
        return self._files[path].get_slice(name)[cut] if cut else self._files[path].get_tensor(name)

    def close(self) -> None:
        self._files.clear()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
