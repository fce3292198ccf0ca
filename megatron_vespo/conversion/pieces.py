"""The Hugging Face tensors of one parameter, read once, hashed on the way, and cut into a checkpoint's pieces."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.forms import merge, pad_rows
from megatron_vespo.checkpoint.manifest import TensorHash, TensorRecord
from megatron_vespo.checkpoint.mapping import Form, Place, Shape, Sharding
from megatron_vespo.checkpoint.safetensors_folder import TensorHeader
from megatron_vespo.checkpoint.safetensors_stream import DTYPES, RowReader
from megatron_vespo.conversion.plan import name_of, row_blocks


class PlaceSource:
    """One place's tensors, cast to `dtype` as they are read. Each row must be read exactly once, in order."""

    def __init__(self, reader: RowReader, headers: dict[str, TensorHeader], place: Place, dtype: torch.dtype):
        self._reader = reader
        self._headers = {name: headers[name] for name in place.hf_names}
        self._hashes = {name: TensorHash() for name in place.hf_names}
        self._dtype = dtype
        self.not_finite: list[str] = []

    def rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        tensor = self._reader.read(name, rows)
        self._hashes[name].update(tensor)
        tensor = tensor.to(self._dtype)
        if not all_finite(tensor) and name not in self.not_finite:
            self.not_finite.append(name)
        return tensor

    def records(self) -> list[TensorRecord]:
        """Of the tensors as they are in the source, once all rows were read."""
        return [
            TensorRecord(name, header.shape, name_of(DTYPES[header.dtype]), hash_.hexdigest(), header.file.name)
            for (name, header), hash_ in zip(self._headers.items(), self._hashes.values(), strict=True)
        ]


def all_finite(tensor: Tensor) -> bool:
    """In one pass and without a mask: NaN and Inf show in the extremes."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def pieces(
    place: Place, source: PlaceSource, architecture: Architecture, ranks: int, vocabulary_rows: int
) -> Iterator[tuple[Shape, Tensor]]:
    """(offset, tensor) of rectangles that make up the parameter as Megatron's checkpoints hold it.

    `ranks` tensor-parallel ranks each find what they hold in pieces of their own.
    """
    entry, names = place.entry, place.hf_names
    shapes = list(entry.hf.values())
    if entry.form is Form.QKV:
        merged = merge(entry, [source.rows(name) for name in names], architecture)
        length = merged.shape[0] // ranks
        for rank in range(ranks):
            yield (rank * length, *(0,) * (merged.dim() - 1)), merged[rank * length : (rank + 1) * length]
    elif entry.sharding is Sharding.COLUMNS and ranks > 1:
        whole = source.rows(names[0])
        length = whole.shape[1] // ranks
        for rank in range(ranks):
            yield (0, rank * length), whole[:, rank * length : (rank + 1) * length]
    else:
        shares = ranks if entry.sharding in (Sharding.ROWS, Sharding.VOCABULARY) else 1
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            rows = vocabulary_rows if entry.sharding is Sharding.VOCABULARY else shape[0]
            for block in row_blocks(rows, 4 * torch.Size(shape[1:]).numel(), shares):
                real = source.rows(name, slice(min(block.start, shape[0]), min(block.stop, shape[0])))
                filled = real if len(real) == block.stop - block.start else pad_rows(real, block.stop - block.start)
                yield (first + block.start, *(0,) * (len(shape) - 1)), filled
            first += rows
