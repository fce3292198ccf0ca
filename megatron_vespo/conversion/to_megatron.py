"""A Hugging Face folder -> a Megatron-Core `torch_dist` checkpoint that every layout loads."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import CONFIG_FILE, Architecture, read_architecture, read_config_json
from megatron_vespo.checkpoint.check import checked_tensors
from megatron_vespo.checkpoint.direct_file import DirectWriter
from megatron_vespo.checkpoint.forms import split
from megatron_vespo.checkpoint.manifest import TensorRecord, hash_of
from megatron_vespo.checkpoint.mapping import Place, Sharding
from megatron_vespo.checkpoint.output_folder import copy_companions, write_config
from megatron_vespo.checkpoint.safetensors_folder import TensorHeader
from megatron_vespo.checkpoint.safetensors_stream import DTYPES, RowReader
from megatron_vespo.checkpoint.shards import plan_shards
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.checkpoint.torch_dist_format import (
    METADATA_FILE,
    Piece,
    StoredTensor,
    read_index,
    save_piece,
    write_index,
)
from megatron_vespo.checkpoint.torch_dist_names import Region, extra_state_keys, regions
from megatron_vespo.checkpoint.torch_dist_read import PieceReader, locate
from megatron_vespo.config import ConfigError, LayoutConfig
from megatron_vespo.conversion.pieces import PlaceSource, pieces
from megatron_vespo.conversion.plan import (
    bitwise_equal,
    fingerprint,
    name_of,
    require_layout,
    row_blocks,
)
from megatron_vespo.conversion.run import OutputFile, Part
from megatron_vespo.conversion.workers import Advance

HF_FOLDER = "hf"
"""Inside the checkpoint: config.json and the tokenizer's files, with which it is built and converted back."""
DEFAULT_FILE_BYTES = 1000**3


@dataclass(frozen=True)
class ToMegatron:
    """A `run.Conversion`. What is cached is read once in each process."""

    source: Path
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Decides how tensors are cut into pieces and files; every other layout can load the checkpoint too."""
    vocabulary_multiple: int = 1
    dtype: torch.dtype | None = None
    """None keeps each tensor's."""
    file_bytes: int = DEFAULT_FILE_BYTES
    marker = METADATA_FILE

    @cached_property
    def architecture(self) -> Architecture:
        return read_architecture(self.source)

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        return checked_tensors(self.source, self.architecture)

    @cached_property
    def vocabulary_rows(self) -> int:
        return require_layout(self.architecture, self.layout, self.vocabulary_multiple)

    def output_files(self) -> list[OutputFile]:
        return self._files

    @cached_property
    def _files(self) -> list[OutputFile]:
        """Cut so that a rank of the layout opens only files with tensors of its pipeline stage and of its experts."""
        self._require_one_dtype_each()
        homes: defaultdict[tuple[int, int], list[Place]] = defaultdict(list)
        for place in table_of(self.architecture).places(self.architecture):
            homes[self._home(place)].append(place)
        files = []
        for number, (_, places) in enumerate(sorted(homes.items())):
            by_name = {place.name: place for place in places}
            sizes = {name: self._nbytes(place) for name, place in by_name.items()}
            for part, names in enumerate(plan_shards(sizes, self.file_bytes)):
                held = tuple(by_name[name] for name in names)
                files.append(OutputFile(f"__{number}_{part}.distcp", held, sum(sizes[name] for name in names)))
        return files

    def _home(self, place: Place) -> tuple[int, int]:
        """(pipeline stage, expert-parallel rank) that holds it."""
        if place.layer is None:
            return (0 if place.name.startswith("embedding.") else self.layout.pp - 1), 0
        stage = place.layer // (self.architecture.num_layers // self.layout.pp)
        if place.expert is None:
            return stage, 0
        return stage, place.expert // (self.architecture.num_experts // self.layout.ep)

    def dtype_of(self, place: Place) -> torch.dtype:
        return self.dtype or DTYPES[self.headers[place.hf_names[0]].dtype]

    def _nbytes(self, place: Place) -> int:
        return torch.Size(place.entry.megatron_shape).numel() * self.dtype_of(place).itemsize

    def regions(self, place: Place) -> list[Region]:
        return regions(place, self.architecture, self.vocabulary_rows)

    def _require_one_dtype_each(self) -> None:
        found: defaultdict[str, set[str]] = defaultdict(set)
        for place in table_of(self.architecture).places(self.architecture):
            found[self.regions(place)[0].key].update(self.headers[name].dtype for name in place.hf_names)
        mixed = [f"  {key}: {', '.join(sorted(dtypes))}" for key, dtypes in found.items() if len(dtypes) > 1]
        if mixed and self.dtype is None:
            message = "tensors of several dtypes make up one of Megatron's; choose one with --dtype"
            raise ConfigError("\n".join([f"{self.source}: {message}", *mixed]))

    def plan(self) -> dict[str, Any]:
        described = {name: (header.shape, header.dtype, header.file.name) for name, header in self.headers.items()}
        files = [self.source / CONFIG_FILE, *(header.file for header in self.headers.values())]
        return {
            "conversion": "Hugging Face to Megatron-Core torch_dist",
            "architecture": self.architecture.architecture,
            "layout": {axis: getattr(self.layout, axis) for axis in ("tp", "etp", "ep", "pp")},
            "vocabulary_rows": self.vocabulary_rows,
            "dtype": name_of(self.dtype) if self.dtype else None,
            "file_bytes": self.file_bytes,
            "source": fingerprint(described, files),
        }

    def write(self, file: OutputFile, path: Path, advance: Advance) -> Part:
        part = Part(file.name)
        with RowReader(self.headers) as reader, DirectWriter(path) as stream:
            for place in file.places:
                source = PlaceSource(reader, self.headers, place, self.dtype_of(place))
                ranks = self.layout.tp if place.expert is None else self.layout.etp
                for offset, tensor in pieces(place, source, self.architecture, ranks, self.vocabulary_rows):
                    where = self.regions(place)
                    leading = (1,) * len(where[0].index)
                    piece = tensor.contiguous().view(*leading, *tensor.shape)
                    span, digest = save_piece(stream, piece), hash_of(piece)
                    for region in where:  # under each of its keys, the same bytes
                        at = (*region.index, *offset)
                        record = TensorRecord(
                            region.key, tuple(piece.shape), name_of(piece.dtype), digest, file.name, at
                        )
                        part.target.append(record)
                        part.spans.append(span)
                    advance(piece.nbytes)
                part.source += source.records()
                part.not_finite += source.not_finite
            part.size = stream.tell()
        return part

    def finish(self, folder: Path, parts: Sequence[Part]) -> None:
        written: defaultdict[str, list[Piece]] = defaultdict(list)
        for part in parts:
            for record, (start, length) in zip(part.target, part.spans, strict=True):
                assert record.offset is not None  # of a piece
                written[record.name].append(Piece(record.offset, record.shape, part.file, start, length))
        tensors: dict[str, StoredTensor] = {}
        table = table_of(self.architecture)
        for place in table.places(self.architecture):
            for region in self.regions(place):
                if region.key not in tensors:
                    ordered = tuple(sorted(written[region.key], key=lambda piece: piece.offset))
                    tensors[region.key] = StoredTensor(region.shape, self.dtype_of(place), ordered)
        write_index(folder, tensors, extra_state_keys(self.architecture))
        locate(folder, read_index(folder), table, self.architecture)
        (folder / HF_FOLDER).mkdir(exist_ok=True)
        write_config(read_config_json(self.source), folder / HF_FOLDER, self.dtype)
        copy_companions(self.source, folder / HF_FOLDER)

    def verifier(self, folder: Path) -> "MegatronVerifier":
        return MegatronVerifier(self, folder)


@dataclass(frozen=True)
class MegatronVerifier:
    """Reads a written file's tensors back from the checkpoint and takes them apart: are they the source's, bit for bit?"""

    conversion: ToMegatron
    folder: Path

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        return read_index(self.folder)

    def __call__(self, file: OutputFile, advance: Advance) -> list[str]:
        different: list[str] = []
        with RowReader(self.conversion.headers) as source, PieceReader(self.folder, self.stored) as written:
            for place in file.places:
                for region in self.conversion.regions(place):
                    different += self._differing(place, region, source, written)
                advance(torch.Size(place.entry.megatron_shape).numel() * self.conversion.dtype_of(place).itemsize)
        return different

    def _differing(self, place: Place, region: Region, source: RowReader, written: PieceReader) -> list[str]:
        dtype, names = self.conversion.dtype_of(place), place.hf_names
        if place.entry.sharding is not Sharding.VOCABULARY:
            back = split(place.entry, written.read(region), self.conversion.architecture)
            pairs = zip(names, back, strict=True)
            return [name for name, found in pairs if not bitwise_equal(found, source.read(name).to(dtype))]
        real = place.entry.megatron_shape[0]
        blocks = row_blocks(real, 4 * place.entry.megatron_shape[1])
        rows_differ = any(
            not bitwise_equal(written.read(region, rows), source.read(names[0], rows).to(dtype)) for rows in blocks
        )
        filling: Tensor = written.read(region, slice(real, None))
        return names if rows_differ or bool(filling.count_nonzero()) else []


def require_equal_duplicates(conversion: ToMegatron) -> None:
    """Raises ConfigError if the folder holds a tied output layer that is not the embedding."""
    headers = conversion.headers
    with RowReader(headers) as reader:
        for copy, original in table_of(conversion.architecture).duplicates.items():
            if copy not in headers:
                continue
            shape = headers[copy].shape
            for rows in row_blocks(shape[0], 4 * shape[1]):
                if headers[copy].dtype != headers[original].dtype or not bitwise_equal(
                    reader.read(copy, rows), reader.read(original, rows)
                ):
                    raise ConfigError(
                        f"{conversion.source}: {copy} differs from {original}, but tie_word_embeddings is true"
                    )
