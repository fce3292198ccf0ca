"""A Megatron-Core `torch_dist` checkpoint -> a Hugging Face folder of sharded safetensors."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import CONFIG_FILE, Architecture, read_architecture, read_config_json
from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.direct_file import DirectWriter
from megatron_vespo.checkpoint.forms import merge, split
from megatron_vespo.checkpoint.manifest import TensorHash, TensorRecord, piece_hashes
from megatron_vespo.checkpoint.mapping import Form, Place, Shape
from megatron_vespo.checkpoint.output_folder import copy_companions, write_config
from megatron_vespo.checkpoint.safetensors_folder import INDEX_FILE, read_headers
from megatron_vespo.checkpoint.safetensors_stream import RowReader, RowWriter
from megatron_vespo.checkpoint.shards import plan_shards, shard_names
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.checkpoint.torch_dist_format import METADATA_FILE, StoredTensor, read_index
from megatron_vespo.checkpoint.torch_dist_names import Region
from megatron_vespo.checkpoint.torch_dist_read import PieceReader, locate
from megatron_vespo.conversion.pieces import all_finite
from megatron_vespo.conversion.plan import bitwise_equal, fingerprint, name_of, row_blocks
from megatron_vespo.conversion.run import OutputFile, Part
from megatron_vespo.conversion.workers import Advance

DEFAULT_FILE_BYTES = 2 * 1000**3


@dataclass(frozen=True)
class ToHF:
    """A `run.Conversion`. What is cached is read once in each process."""

    source: Path
    config_folder: Path
    """With config.json and the tokenizer's files."""
    dtype: torch.dtype | None = None
    """None keeps each tensor's."""
    file_bytes: int = DEFAULT_FILE_BYTES
    marker = CONFIG_FILE

    @cached_property
    def architecture(self) -> Architecture:
        return read_architecture(self.config_folder)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        return read_index(self.source)

    @cached_property
    def where(self) -> dict[str, Region]:
        return locate(self.source, self.stored, table_of(self.architecture), self.architecture)

    @cached_property
    def hashes(self) -> dict[tuple[str, Shape], str]:
        return piece_hashes(self.source)

    def output_files(self) -> list[OutputFile]:
        return self._files

    @cached_property
    def _files(self) -> list[OutputFile]:
        """All tensors of a parameter are in one file; wider dtypes come first, so that each tensor is aligned."""
        _ = self.where
        places = {place.name: place for place in table_of(self.architecture).places(self.architecture)}
        sizes = {name: self._nbytes(place) for name, place in places.items()}
        groups = plan_shards(sizes, self.file_bytes)
        files = []
        for file, names in zip(shard_names(len(groups)), groups, strict=True):
            held = sorted((places[name] for name in names), key=lambda place: -self.dtype_of(place).itemsize)
            files.append(OutputFile(file, tuple(held), sum(sizes[name] for name in names)))
        return files

    def dtype_of(self, place: Place) -> torch.dtype:
        return self.dtype or self.stored[self.where[place.name].key].dtype

    def _nbytes(self, place: Place) -> int:
        return torch.Size(place.entry.megatron_shape).numel() * self.dtype_of(place).itemsize

    def plan(self) -> dict[str, Any]:
        files = {piece.file for tensor in self.stored.values() for piece in tensor.pieces}
        paths = [self.config_folder / CONFIG_FILE, *(self.source / name for name in (*files, METADATA_FILE))]
        return {
            "conversion": "Megatron-Core torch_dist to Hugging Face",
            "architecture": self.architecture.architecture,
            "dtype": name_of(self.dtype) if self.dtype else None,
            "file_bytes": self.file_bytes,
            "source": fingerprint(None, paths),
        }

    def write(self, file: OutputFile, path: Path, advance: Advance) -> Part:
        part = Part(file.name)
        with PieceReader(self.source, self.stored, self.hashes) as reader, DirectWriter(path) as stream:
            writer = RowWriter(stream, self._announced(file))
            for place in file.places:
                region, read, written = self.where[place.name], TensorHash(), {}
                for name, rows, original in self._rows(place, reader):
                    if original is not None:
                        read.update(original)
                    writer.write(rows)
                    written.setdefault(name, TensorHash()).update(rows)
                    if not all_finite(rows) and name not in part.not_finite:
                        part.not_finite.append(name)
                    advance(rows.nbytes)
                part.source.append(self._source_record(region, read))
                part.target += [
                    TensorRecord(name, shape, name_of(self.dtype_of(place)), written[name].hexdigest(), file.name)
                    for name, shape in zip(place.hf_names, place.entry.hf.values(), strict=True)
                ]
            part.size = stream.tell()
        return part

    def _announced(self, file: OutputFile) -> dict[str, tuple[Shape, torch.dtype]]:
        return {
            name: (shape, self.dtype_of(place))
            for place in file.places
            for name, shape in zip(place.hf_names, place.entry.hf.values(), strict=True)
        }

    def _rows(self, place: Place, reader: PieceReader) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(Hugging Face name, its next rows, what was read of the checkpoint for them or None if that came before)."""
        region, entry, dtype = self.where[place.name], place.entry, self.dtype_of(place)
        if entry.form is Form.WHOLE:
            for rows in row_blocks(entry.megatron_shape[0], 4 * torch.Size(entry.megatron_shape[1:]).numel()):
                read = reader.read(region, rows)
                yield place.hf_names[0], read.to(dtype), read
            return
        whole = reader.read(region)
        parts = split(entry, whole, self.architecture)
        for number, (name, tensor) in enumerate(zip(place.hf_names, parts, strict=True)):
            yield name, tensor.to(dtype), None if number else whole

    def _source_record(self, region: Region, read: TensorHash) -> TensorRecord:
        """Of the region, without rows that fill up a vocabulary."""
        leading = len(region.index)
        shape = (1,) * leading + region.shape[leading:]
        offset = region.index + (0,) * (len(shape) - leading)
        dtype = self.stored[region.key].dtype
        return TensorRecord(region.key, shape, name_of(dtype), read.hexdigest(), self.source.name, offset)

    def finish(self, folder: Path, parts: Sequence[Part]) -> None:
        if len(parts) > 1:
            placed = {record.name: part.file for part in parts for record in part.target}
            index = {"metadata": {"total_size": sum(file.nbytes for file in self._files)}, "weight_map": placed}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        dtypes = {self.dtype_of(place) for file in self._files for place in file.places}
        write_config(read_config_json(self.config_folder), folder, dtypes.pop() if len(dtypes) == 1 else None)
        copy_companions(self.config_folder, folder)
        check_folder(folder)

    def verifier(self, folder: Path) -> "HFVerifier":
        return HFVerifier(self, folder)


@dataclass(frozen=True)
class HFVerifier:
    """Reads a written file's tensors, puts them together again: are they the checkpoint's, bit for bit?"""

    conversion: ToHF
    folder: Path

    def __call__(self, file: OutputFile, advance: Advance) -> list[str]:
        c = self.conversion
        different: list[str] = []
        written_tensors = read_headers(self.folder).tensors
        with PieceReader(c.source, c.stored) as stored, RowReader(written_tensors) as written:
            for place in file.places:
                region, dtype, entry = c.where[place.name], c.dtype_of(place), place.entry
                if entry.form is Form.WHOLE:
                    blocks = row_blocks(entry.megatron_shape[0], 4 * torch.Size(entry.megatron_shape[1:]).numel())
                    pairs = ((written.read(place.hf_names[0], rows), stored.read(region, rows)) for rows in blocks)
                else:
                    merged = merge(entry, [written.read(name) for name in place.hf_names], c.architecture)
                    pairs = iter([(merged, stored.read(region))])
                if any(not bitwise_equal(found, expected.to(dtype)) for found, expected in pairs):
                    different.append(region.key)
                advance(torch.Size(entry.megatron_shape).numel() * dtype.itemsize)
        return different
