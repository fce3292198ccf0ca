"""The checksums that an engine reports of its tensors, computed from Hugging Face tensors.

SGLang's `/weights_checker` hashes each parameter as the engine holds it. It holds some of them fused: queries, keys and
values in one matrix, gate and up projections in one, all experts of a layer in two. The hashes are those of
sglang.srt.managers.mm_utils.tensor_hash (0.5.23), written again here so that a trainer need not import SGLang.
"""

import hashlib
import re
from collections.abc import Iterable
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


@dataclass
class Fused:
    """A tensor of the engine, as its parts arrive."""

    rows: int
    """Parts of one row: of a matrix, or of each expert."""
    stacked: bool
    """Experts are stacked along a new first dimension."""
    parts: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def missing(self, experts: int) -> list[tuple[int, int]]:
        return [(e, r) for e in range(experts) for r in range(self.rows) if (e, r) not in self.parts]

    def assemble(self) -> torch.Tensor:
        experts = 1 + max(expert for expert, _ in self.parts)
        each = [torch.cat([self.parts[expert, row] for row in range(self.rows)]) for expert in range(experts)]
        return torch.stack(each) if self.stacked else each[0]


def expected_checksums(
    hf_tensors: Iterable[tuple[str, torch.Tensor]], *, dtype: str | torch.dtype, num_experts: int | None = None
) -> dict[str, str]:
    """What an engine of tensor parallel size 1 reports when it holds these weights.

    Args:
        hf_tensors: all weights of the model by their Hugging Face names, in any order. Tensors on CUDA are hashed as an
            engine on CUDA does it, others as an engine on a CPU does.
        dtype: of the engine's parameters.
        num_experts: of each layer; if given, a layer's experts are let go as soon as all have come.

    Raises:
        ValueError: parts of a fused tensor are missing; the message names them.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    checksums: dict[str, str] = {}
    fused: dict[str, Fused] = {}
    for name, tensor in hf_tensors:
        tensor = tensor.detach().to(dtype)
        place = place_of(name)
        if place is None:
            checksums[name] = tensor_checksum(pad_vocabulary(tensor) if VOCABULARY.search(name) else tensor)
            continue
        target, expert, row, rows, stacked = place
        pending = fused.setdefault(target, Fused(rows, stacked))
        pending.parts[expert, row] = tensor
        experts = num_experts if stacked else 1
        if experts is not None and not pending.missing(experts):
            checksums[target] = tensor_checksum(fused.pop(target).assemble())
    for target, pending in fused.items():
        experts = 1 + max(expert for expert, _ in pending.parts)
        if missing := pending.missing(num_experts or experts if pending.stacked else 1):
            raise ValueError(f"{target}: parts are missing, (expert, row): {missing[:8]}")
        checksums[target] = tensor_checksum(pending.assemble())
    return checksums


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


def pad_vocabulary(tensor: torch.Tensor) -> torch.Tensor:
    missing = -tensor.shape[0] % VOCABULARY_PADDING
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


def tensor_checksum(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits, as `/weights_checker` reports them."""
    tensor = tensor.contiguous()
    words = tile_hash(tensor) if tensor.is_cuda else sha256_hash(tensor)
    return f"{words:016x}"


def sha256_hash(tensor: torch.Tensor) -> int:
    """The first 8 bytes of SHA-256 over the bytes of a tensor, big endian."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return int.from_bytes(hashlib.sha256(data.data).digest()[:8], "big")


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
