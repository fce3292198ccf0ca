"""The checksums that an engine reports of its tensors, computed from Hugging Face tensors.

SGLang's `/weights_checker` hashes each parameter as each rank of the engine holds it. It holds some of them fused:
queries, keys and values in one matrix, gate and up projections in one, all experts of a layer in two; and with tensor
parallelism only a shard of most. The hashes are those of sglang.srt.managers.mm_utils.tensor_hash (0.5.23), written again
here so that a trainer need not import SGLang.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

VOCABULARY_PADDING = 64
"""SGLang pads embedding and head with zero rows to a multiple of this."""

PARTS = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}
"""Part -> the matrix it is in, its place there, and how many parts that has. Parts are put behind each other's rows."""

EXPERT_PARTS = {"gate_proj": ("w13_weight", 0), "up_proj": ("w13_weight", 1), "down_proj": ("w2_weight", 0)}
EXPERT_ROWS = {"w13_weight": 2, "w2_weight": 1}
"""How many parts each expert has in a fused tensor [experts, rows, columns]."""

EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
PART = re.compile(r"^(.*)\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.(weight|bias)$")
VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")
KEYS_AND_VALUES = re.compile(r"\.(k_proj|v_proj)\.(weight|bias)$")
CUT_BY_ROWS = re.compile(r"\.(q_proj|gate_proj|up_proj)\.(weight|bias)$")
CUT_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj)\.weight$")


@dataclass(frozen=True)
class EngineRank:
    """One of the tensor-parallel ranks of an engine without expert parallelism."""

    rank: int = 0
    ranks: int = 1
    kv_heads: int | None = None
    """Of the model; needed where there are more ranks than one: with fewer heads than ranks, several have the same."""

    def shard(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the Hugging Face tensor `name`: a view where that is possible."""
        if VOCABULARY.search(name):
            return pad_vocabulary(tensor, self.ranks).chunk(self.ranks)[self.rank]
        if self.ranks == 1:
            return tensor
        if KEYS_AND_VALUES.search(name):
            if self.kv_heads is None:
                raise ValueError(f"{name}: the number of key heads decides how {self.ranks} ranks share it")
            pieces = min(self.ranks, self.kv_heads)
            return tensor.chunk(pieces)[self.rank * pieces // self.ranks]
        if CUT_BY_ROWS.search(name):
            return tensor.chunk(self.ranks)[self.rank]
        if CUT_BY_COLUMNS.search(name):
            return tensor.chunk(self.ranks, dim=1)[self.rank]
        return tensor


@dataclass
class Fused:
    """A tensor of the engine, as its parts arrive."""

    rows: int
    """Parts of one row: of a matrix, or of each expert."""
    parts: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """By expert (0 where there are none) and place in the row."""

    def missing(self, experts: int) -> list[tuple[int, int]]:
        return [(e, r) for e in range(experts) for r in range(self.rows) if (e, r) not in self.parts]

    def checksum(self) -> str:
        return checksum_of_parts([self.parts[key] for key in sorted(self.parts)])


class ExpectedChecksums:
    """Of one rank of an engine, as tensors come."""

    def __init__(self, place: EngineRank, dtype: torch.dtype, num_experts: int | None) -> None:
        self._place = place
        self._dtype = dtype
        self._num_experts = num_experts
        self._fused: dict[str, Fused] = {}
        self._checksums: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` is kept while it waits for other parts of a fused one."""
        tensor = self._place.shard(name, tensor.detach()).to(self._dtype)
        place = place_of(name)
        if place is None:
            self._checksums[name] = tensor_checksum(tensor)
            return
        target, expert, row, rows, stacked = place
        pending = self._fused.setdefault(target, Fused(rows))
        pending.parts[expert, row] = tensor
        experts = self._num_experts if stacked else 1
        if experts is not None and len(pending.parts) == rows * experts:
            self._checksums[target] = self._fused.pop(target).checksum()

    def finish(self) -> dict[str, str]:
        """By the engine's names. Raises ValueError: parts of a fused tensor are missing; the message names them."""
        for target, pending in self._fused.items():
            experts = 1 + max(expert for expert, _ in pending.parts)
            if ".experts." in target and self._num_experts is not None:
                experts = self._num_experts
            if missing := pending.missing(experts):
                raise ValueError(f"{target}: parts are missing, (expert, row): {missing[:8]}")
            self._checksums[target] = pending.checksum()
        return self._checksums


def expected_checksums(
    hf_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: str | torch.dtype,
    num_experts: int | None = None,
    kv_heads: int | None = None,
    ranks: int = 1,
) -> list[dict[str, str]]:
    """What each rank of an engine of `ranks` tensor-parallel ranks reports when it holds these weights.

    Args:
        hf_tensors: all weights of the model by their Hugging Face names, in any order. Tensors on CUDA are hashed as an
            engine on CUDA does it, others as an engine on a CPU does.
        dtype: of the engine's parameters.
        num_experts: of each layer; if given, a layer's experts are let go as soon as all have come.
        kv_heads: of the model; needed where `ranks` is more than one.

    Raises:
        ValueError: parts of a fused tensor are missing; the message names them.
    """
    held_as: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    places = [EngineRank(rank, ranks, kv_heads) for rank in range(ranks)]
    expected = [ExpectedChecksums(place, held_as, num_experts) for place in places]
    for name, tensor in hf_tensors:
        for one in expected:
            one.add(name, tensor)
    return [one.finish() for one in expected]


def place_of(name: str) -> tuple[str, int, int, int, bool] | None:
    """The engine's tensor that `name` is a part of: its name, expert, row, parts per row, stacked. None: not fused."""
    if match := EXPERT.match(name):
        prefix, expert, part = match.groups()
        target, row = EXPERT_PARTS[part]
        return f"{prefix}.{target}", int(expert), row, EXPERT_ROWS[target], True
    if match := PART.match(name):
        prefix, part, kind = match.groups()
        target, row, rows = PARTS[part]
        return f"{prefix}.{target}.{kind}", 0, row, rows, False
    return None


def pad_vocabulary(tensor: torch.Tensor, ranks: int = 1) -> torch.Tensor:
    """With zero rows, as SGLang's VocabParallelEmbedding has it for so many ranks."""
    missing = -tensor.shape[0] % VOCABULARY_PADDING
    if (tensor.shape[0] + missing) % ranks:
        missing = -tensor.shape[0] % (VOCABULARY_PADDING * ranks)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def compare_checksums(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is wrong on an engine that reports `found`: one line a tensor, in the order of names; empty if all is well."""
    differences = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            differences.append(f"{name}: the engine has no such tensor")
        elif name not in expected:
            differences.append(f"{name}: only on the engine; nothing that was sent belongs to it")
        elif expected[name] != found[name]:
            differences.append(f"{name}: differs (expected {expected[name]}, the engine has {found[name]})")
    return differences


def compare_ranks(expected: Sequence[dict[str, str]], found: Sequence[dict[str, str]]) -> list[str]:
    """As `compare_checksums`, of all ranks of an engine; lines name the rank where there are several."""
    if len(expected) != len(found):
        return [f"the engine has {len(found)} ranks, expected {len(expected)}"]
    if len(expected) == 1:
        return compare_checksums(expected[0], found[0])
    pairs = enumerate(zip(expected, found, strict=True))
    return [f"rank {rank}: {line}" for rank, pair in pairs for line in compare_checksums(*pair)]


def tensor_checksum(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits, as `/weights_checker` reports them."""
    return checksum_of_parts([tensor])


def checksum_of_parts(parts: Sequence[torch.Tensor]) -> str:
    """Of the tensor whose bytes are those of `parts` behind each other."""
    on_cuda = parts[0].is_cuda
    words = tile_hash(torch.cat([part.reshape(-1) for part in parts])) if on_cuda else sha256_hash(parts)
    return f"{words:016x}"


def sha256_hash(parts: Sequence[torch.Tensor]) -> int:
    """The first 8 bytes of SHA-256 over the bytes of tensors, big endian."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "big")


TILE_WORDS = 8192
TILES_AT_ONCE = 512
MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
SEED = 0x243F6A88


def tile_hash(tensor: torch.Tensor) -> int:
    """The hash of sglang.kernels.ops.memory.gpu_tensor_hash, in torch, on the tensor's device.

    Two 32-bit hashes of each tile of 8192 words (a sum of mixed words, so order is in the mixed position), joined to 64
    bits; their sum modulo 2^64, mixed once more. Computed in int64, whose products are right modulo 2^32.
    """
    data = tensor.reshape(-1).view(torch.uint8)
    if len(data) % 4:
        data = torch.cat([data, data.new_zeros(-len(data) % 4)])
    words = data.view(torch.int32)
    if not len(words):
        return 0
    first_seed, second_seed = SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & MASK32
    size = (len(words) * 4) & MASK32
    total = 0
    chunk = TILE_WORDS * TILES_AT_ONCE
    for start in range(0, len(words), chunk):
        part = words[start : start + chunk].to(torch.int64) & MASK32
        index = torch.arange(start, start + len(part), device=words.device) & MASK32
        first = _fmix32(part ^ ((index * 0x27D4EB2D + first_seed) & MASK32) ^ _rotate32(index, 15))
        second = _fmix32(part ^ ((index * 0x165667B1 + second_seed) & MASK32) ^ _rotate32(index, 13))
        for high, low in zip(_tile_sums(first, size), _tile_sums(second, size), strict=True):
            total += (high << 32) | low
    total &= MASK64
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & MASK64
    return total ^ (total >> 31)


def _tile_sums(mixed: torch.Tensor, size: int) -> list[int]:
    padded = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE_WORDS))
    return _fmix32((padded.view(-1, TILE_WORDS).sum(1) & MASK32) ^ size).tolist()


def _rotate32(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & MASK32


def _fmix32(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)
