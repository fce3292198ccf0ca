"""The files of a Megatron-Core `torch_dist` checkpoint: pieces of tensors, and the metadata that says where each is.

The format is torch.distributed.checkpoint's (filesystem.py): `*.distcp` files hold pieces one after the other, each as
`torch.save` writes it; `.metadata` is a pickle of its `Metadata`. Megatron adds `metadata.json`, which names the format,
and `common.pt` with what is not a tensor. Nothing here needs Megatron, process groups or more memory than one piece.
"""

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_vespo.checkpoint.direct_file import DirectReader, DirectWriter
from megatron_vespo.checkpoint.mapping import Shape
from megatron_vespo.checkpoint.torch_dist_names import CONTENT_METADATA
from megatron_vespo.config import ConfigError

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": CONTENT_METADATA}
"""`checkpoint_version`: Megatron-LM reorders the queries, keys and values of checkpoints that do not name one."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a global tensor, in a file."""

    offset: Shape
    sizes: Shape
    file: str
    start: int
    """In bytes from the beginning of the file."""
    length: int


@dataclass(frozen=True)
class StoredTensor:
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def save_piece(stream: DirectWriter, tensor: Tensor) -> tuple[int, int]:
    """Append `tensor`; (start, length) of what was written. Copies it only if it is a part of another one.

    Raises:
        OSError: the file system refused.
    """
    start = stream.tell()
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    try:
        torch.save(tensor, stream)  # type: ignore[arg-type]
    except RuntimeError as error:  # torch's writer finds itself in a wrong place after the stream refused
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return start, stream.tell() - start


class PieceFiles:
    """Reads pieces of one checkpoint's files. Keeps files open until it is closed, and memory for one piece."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._disk = DirectReader()
        self._content = bytearray()

    def load(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Read a piece, as tensors only: nothing else that a file may hold is unpickled.

        Raises:
            ConfigError: the file is missing, truncated or damaged, or holds another tensor there.
        """
        path = self._folder / piece.file
        if len(self._content) < piece.length:
            self._content = bytearray(piece.length)
        content = memoryview(self._content)[: piece.length]
        try:
            self._disk.read_into(path, piece.start, content)
            tensor = torch.load(_Window(content), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error}") from None
        except EOFError as error:
            raise ConfigError(f"{path}: truncated: {error}") from None
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: damaged at byte {piece.start}: {error}") from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != piece.sizes or tensor.dtype != dtype:
            raise ConfigError(f"{path}: damaged: another tensor than {METADATA_FILE} says, at byte {piece.start}")
        return tensor

    def close(self) -> None:
        self._disk.__exit__()


class _Window(io.RawIOBase):
    """Memory as a file, without a copy (BytesIO makes one)."""

    def __init__(self, content: memoryview):
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        found = self._content[self._position : self._position + len(buffer)]
        memoryview(buffer)[: len(found)] = found
        self._position += len(found)
        return len(found)


def write_index(folder: Path, tensors: dict[str, StoredTensor], extra_states: Sequence[str]) -> None:
    """Write everything beside the `*.distcp` files of `tensors`. `extra_states`: keys of objects that are None."""
    described: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for key, tensor in tensors.items():
        chunks = [dcp.ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.sizes)) for p in tensor.pieces]
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        described[key] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, piece in enumerate(tensor.pieces):
            index = dcp.MetadataIndex(key, piece.offset, number)
            storage[index] = _StorageInfo(piece.file, piece.start, piece.length)
    nothing = _write_nothing(folder)
    for key in extra_states:
        described[key] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(key)] = nothing
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(dcp.Metadata(described, storage_data=storage, storage_meta=dcp.StorageMeta()), file)
    torch.save(COMMON, folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def _write_nothing(folder: Path) -> _StorageInfo:
    """One object for all extra states, in Megatron's wrapping (strategies/torch.py, `_mcore_to_torch_sharded_object`)."""
    name = "__extra_states.distcp"
    torch.save([None], folder / name)
    return _StorageInfo(name, 0, (folder / name).stat().st_size)


def read_index(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, whoever wrote it; objects that are no tensors are left out.

    Raises:
        ConfigError: no such checkpoint, or its metadata are damaged or hold what does not belong there.
    """
    folder = Path(folder)
    _require_format(folder)
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        tensors = _tensors_of(metadata)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise ConfigError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    return tensors


def _require_format(folder: Path) -> None:
    path = folder / FORMAT_FILE
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {FORMAT_FILE} in this folder; is it a torch_dist checkpoint?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    if found != FORMAT["sharded_backend"]:
        raise ConfigError(f"{path}: sharded_backend is {found!r}, only 'torch_dist' is read")


def _tensors_of(metadata: dcp.Metadata) -> dict[str, StoredTensor]:
    if not isinstance(metadata, dcp.Metadata):
        raise ValueError(f"a {type(metadata).__name__}, not Metadata")
    pieces: defaultdict[str, dict[Shape, Piece]] = defaultdict(dict)
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, dcp.TensorStorageMetadata)
        for chunk in tensor.chunks
    }
    for index, info in metadata.storage_data.items():
        if index.offset is None:
            continue
        offset = tuple(index.offset)
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{info.relative_path!r} is not the name of a file in this folder")
        pieces[index.fqn][offset] = Piece(
            offset, sizes[index.fqn, offset], info.relative_path, info.offset, info.length
        )
    return {
        key: StoredTensor(
            tuple(tensor.size),
            tensor.properties.dtype,
            tuple(pieces[key][tuple(chunk.offsets)] for chunk in tensor.chunks),
        )
        for key, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, dcp.TensorStorageMetadata)
    }


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the plain records of which torch's checkpoint metadata consist."""

    ALLOWED = frozenset(
        (record.__module__, record.__qualname__)
        for record in (
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp.TensorStorageMetadata,
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.TensorProperties,
            dcp._MEM_FORMAT_ENCODING,
            _StorageInfo,
            planner.SavePlan,
            planner.WriteItem,
            planner.WriteItemType,
            planner.TensorWriteData,
        )
    ) | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}

    RENAMED = {"MCoreMetadata": dcp.Metadata, "MCoreSavePlan": planner.SavePlan}  # noqa: RUF012
    """Megatron-Core 0.15's."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.core.") and name in self.RENAMED:
            return self.RENAMED[name]
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which checkpoint metadata do not need")
