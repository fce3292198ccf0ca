"""Safetensors files read and written row by row, in memory that does not depend on the size of tensors or files.

The `safetensors` library maps files into memory or takes all tensors of a file at once. The format (its README): 8 bytes
with the header's length, a JSON header with each tensor's dtype, shape and bytes from the header's end, then the bytes.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.checkpoint.direct_file import DirectFile
from megatron_vespo.checkpoint.manifest import as_bytes
from megatron_vespo.checkpoint.mapping import Shape
from megatron_vespo.checkpoint.safetensors_folder import TensorHeader
from megatron_vespo.config import ConfigError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
"""Of the header's length, as the library writes it."""


class RowReader:
    """Reads tensors, or ranges of their rows, with plain reads into memory of their own.

    `tensors` must have been checked (`safetensors_folder.read_headers`).
    """

    def __init__(self, tensors: dict[str, TensorHeader]):
        self._tensors = tensors
        self._files: dict[Path, tuple[int, dict[str, int]]] = {}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or its `rows` (of dimension 0, step 1). Raises ConfigError if the file ends before."""
        header = self._tensors[name]
        dtype = DTYPES[header.dtype]
        first, last, _ = rows.indices(header.shape[0])
        tensor = torch.empty((last - first, *header.shape[1:]), dtype=dtype)
        file, starts = self._open(header.file)
        row_bytes = torch.Size(header.shape[1:]).numel() * dtype.itemsize
        _read_into(as_bytes(tensor), file, starts[name] + first * row_bytes, header.file)
        return tensor

    def _open(self, path: Path) -> tuple[int, dict[str, int]]:
        """Its descriptor, and where each of its tensors begins."""
        if path not in self._files:
            try:
                file = os.open(path, os.O_RDONLY)
                length = int.from_bytes(os.pread(file, 8, 0), "little")
                header = json.loads(os.pread(file, length, 8))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: can't be read: {error}") from None
            header.pop("__metadata__", None)
            self._files[path] = file, {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        return self._files[path]

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *exception: object) -> None:
        for file, _ in self._files.values():
            os.close(file)
        self._files.clear()


def _read_into(buffer: memoryview, file: int, start: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], start + done)
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error}") from None
        if count == 0:
            raise ConfigError(f"{path}: truncated: {start + len(buffer)} bytes expected, {start + done} found")
        done += count


class RowWriter:
    """Writes one file. Tensors come in the order that was announced, each in as many row blocks as wanted."""

    def __init__(self, stream: DirectFile, tensors: dict[str, tuple[Shape, torch.dtype]]):
        """Announce all tensors: name -> (shape, dtype)."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (shape, dtype) in tensors.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % ALIGNMENT)
        stream.write(len(content).to_bytes(8, "little") + content)
        self._stream = stream

    def write(self, rows: Tensor) -> None:
        self._stream.write(as_bytes(rows.contiguous()))
