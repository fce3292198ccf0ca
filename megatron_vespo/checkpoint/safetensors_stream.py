"""Safetensors files read and written row by row, in memory that does not depend on the size of tensors or files.

The `safetensors` library maps files into memory or takes all tensors of a file at once. The format (its README): 8 bytes
with the header's length, a JSON header with each tensor's dtype, shape and bytes from the header's end, then the bytes.
"""

import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_vespo.checkpoint.direct_file import DirectReader, DirectWriter
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
        self._starts: dict[Path, dict[str, int]] = {}
        self._disk = DirectReader()

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or its `rows` (of dimension 0, step 1). Raises ConfigError if the file ends before."""
        header = self._tensors[name]
        dtype = DTYPES[header.dtype]
        first, last, _ = rows.indices(header.shape[0])
        tensor = torch.empty((last - first, *header.shape[1:]), dtype=dtype)
        row_bytes = torch.Size(header.shape[1:]).numel() * dtype.itemsize
        try:
            start = self._starts_in(header.file)[name] + first * row_bytes
            self._disk.read_into(header.file, start, as_bytes(tensor))
        except EOFError as error:
            raise ConfigError(f"{header.file}: truncated: {error}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{header.file}: can't be read: {error}") from None
        return tensor

    def _starts_in(self, path: Path) -> dict[str, int]:
        """Where each tensor of a file begins."""
        if path not in self._starts:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._starts[path] = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        return self._starts[path]

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._disk.__exit__()


class RowWriter:
    """Writes one file. Tensors come in the order that was announced, each in as many row blocks as wanted."""

    def __init__(self, stream: DirectWriter | BinaryIO, tensors: dict[str, tuple[Shape, torch.dtype]]):
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
