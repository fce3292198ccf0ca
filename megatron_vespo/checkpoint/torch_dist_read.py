"""The mapping table's parameters in a `torch_dist` checkpoint: checked from its metadata, then read one after the other."""

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.manifest import hash_of
from megatron_vespo.checkpoint.mapping import Place, Shape, Sharding, Table
from megatron_vespo.checkpoint.torch_dist_format import Piece, PieceFiles, StoredTensor
from megatron_vespo.checkpoint.torch_dist_names import MODEL_KEYS, Region, readable_regions
from megatron_vespo.config import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def locate(
    folder: str | Path, stored: dict[str, StoredTensor], table: Table, architecture: Architecture
) -> dict[str, Region]:
    """`Place.name` -> where each parameter of the model is. Reads no tensor.

    What does not belong to the model's weights (an optimizer's state) is passed over.

    Raises:
        ConfigError: lists every missing, extra, mis-shaped, incomplete or truncated tensor.
    """
    folder = Path(folder)
    found: dict[str, Region] = {}
    problems: set[str] = set()
    known: set[str] = set()
    for place in table.places(architecture):
        candidates = readable_regions(place, architecture, _vocabulary_rows(place, stored))
        known.update(region.key for region in candidates)
        region = next((region for region in candidates if region.key in stored), None)
        if region is None:
            problems.add(f"{candidates[0].key}: missing, expected shape {list(candidates[0].shape)}")
        elif stored[region.key].shape != region.shape:
            problems.add(
                f"{region.key}: has shape {list(stored[region.key].shape)}, expected {list(region.shape)} from config.json"
            )
        else:
            found[place.name] = region
    problems.update(
        f"{key}: extra, shape {list(tensor.shape)}; config.json has no place for it"
        for key, tensor in stored.items()
        if key.startswith(MODEL_KEYS) and key not in known
    )
    sizes = _file_sizes(folder, stored)
    for key in {region.key for region in found.values()}:
        problems.update(_piece_problems(key, stored[key], sizes))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in sorted(problems))
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{folder}: {count} with the tensors of this {architecture.architecture}\n{listed}")
    return found


def _vocabulary_rows(place: Place, stored: dict[str, StoredTensor]) -> int:
    """As many as there are, if they suffice: how far a vocabulary is filled up is the checkpoint's affair."""
    rows = place.entry.megatron_shape[0]
    if place.entry.sharding is Sharding.VOCABULARY and (tensor := stored.get(place.entry.megatron[0])) is not None:
        return max(rows, tensor.shape[0])
    return rows


def _file_sizes(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, int]:
    """-1 for files that are missing."""
    names = {piece.file for tensor in stored.values() for piece in tensor.pieces}
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else -1 for name in names}


def _piece_problems(key: str, tensor: StoredTensor, file_sizes: dict[str, int]) -> list[str]:
    problems = []
    if tensor.dtype not in DTYPES:
        problems.append(f"{key}: has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for piece in tensor.pieces:
        size = file_sizes[piece.file]
        if size < piece.start + piece.length:
            problems.append(f"{piece.file}: {'missing' if size < 0 else 'truncated'}")
    volume = sum(math.prod(piece.sizes) for piece in tensor.pieces)
    if volume != math.prod(tensor.shape) or len({piece.offset for piece in tensor.pieces}) != len(tensor.pieces):
        problems.append(f"{key}: its pieces hold {volume} elements of {math.prod(tensor.shape)}: incomplete or doubled")
    return problems


class PieceReader:
    """Reads regions of a checkpoint, piece by piece, and compares each with its hash where there is one."""

    def __init__(
        self, folder: str | Path, stored: dict[str, StoredTensor], hashes: dict[tuple[str, Shape], str] | None = None
    ):
        self._folder = Path(folder)
        self._files = PieceFiles(self._folder)
        self._stored = stored
        self._hashes = hashes or {}
        self._last: tuple[Piece, Tensor] | None = None
        self._by_index: dict[tuple[str, int], dict[Shape, list[Piece]]] = {}

    def read(self, region: Region, rows: slice = slice(None)) -> Tensor:
        """The parameter, or its `rows` (of dimension 0, step 1). Raises ConfigError if a piece is damaged or missing."""
        stored = self._stored[region.key]
        leading = len(region.index)
        shape = region.shape[leading:]
        first, last, _ = rows.indices(shape[0])
        wanted = [(i, i + 1) for i in region.index] + [(first, last)] + [(0, size) for size in shape[1:]]
        result = torch.empty([end - start for start, end in wanted], dtype=stored.dtype)
        filled = 0
        for piece in self._pieces(region):
            overlap = [
                (max(start, offset), min(end, offset + size))
                for (start, end), offset, size in zip(wanted, piece.offset, piece.sizes, strict=True)
            ]
            if any(start >= end for start, end in overlap):
                continue
            target = [slice(s - start, e - start) for (s, e), (start, _) in zip(overlap, wanted, strict=True)]
            source = [slice(s - offset, e - offset) for (s, e), offset in zip(overlap, piece.offset, strict=True)]
            result[tuple(target)] = self._load(region.key, piece, stored.dtype)[tuple(source)]
            filled += math.prod(end - start for start, end in overlap)
        if filled != result.numel():
            raise ConfigError(f"{self._folder}: {region.key}: its pieces overlap, and leave a part of it out")
        return result.view(last - first, *shape[1:])

    def _pieces(self, region: Region) -> list[Piece]:
        """Those that hold something of `region`: a tensor in which layers and experts are stacked has very many."""
        leading = len(region.index)
        if (by_index := self._by_index.get((region.key, leading))) is None:
            by_index = self._by_index[region.key, leading] = {}
            for piece in self._stored[region.key].pieces:
                spans = zip(piece.offset[:leading], piece.sizes[:leading], strict=True)
                for index in itertools.product(*(range(start, start + size) for start, size in spans)):
                    by_index.setdefault(index, []).append(piece)
        return by_index.get(region.index, [])

    def _load(self, key: str, piece: Piece, dtype: torch.dtype) -> Tensor:
        """The last one is kept: row blocks of a large tensor come out of the same piece."""
        if self._last is None or self._last[0] != piece:
            self._last = None
            tensor = self._files.load(piece, dtype)
            expected = self._hashes.get((key, piece.offset))
            if expected is not None and hash_of(tensor.contiguous()) != expected:
                raise ConfigError(f"{self._folder / piece.file}: damaged: {key} differs from its hash in the manifest")
            self._last = piece, tensor
        return self._last[1]

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()
