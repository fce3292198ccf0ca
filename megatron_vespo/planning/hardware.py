"""What GPUs and networks can do: published numbers, and what share of them is assumed to be reached."""

import re
from dataclasses import dataclass

from megatron_vespo.config import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """One GPU and its connections.

    Attributes:
        flops: dense bfloat16, a second.
        memory_bandwidth: bytes a second.
        node_bandwidth, network_bandwidth: bytes a second and GPU, in one direction, within a node and between nodes.
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


GPUS = {
    "h100": Hardware("H100 SXM", 80 * GB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware("H200 SXM", 141 * GB, 989e12, 4.8e12, 450e9, 50e9),
    "a100": Hardware("A100 SXM", 80 * GB, 312e12, 2.039e12, 300e9, 25e9),
}
"""NVIDIA's data sheets. Network: a 400 (A100: 200) Gbit/s port for each GPU, as in DGX machines."""

DENSE_EFFICIENCY = 0.40
"""Of peak FLOP/s in the matrix products of a training step; an assumption (Megatron-LM's README has up to 47% of whole
steps on H100)."""
EXPERT_EFFICIENCY = 0.20
"""The same of experts, whose matrices are small; an assumption, with which Qwen3-30B-A3B comes near the published
5,275 to 10,494 tokens/s and GPU (Megatron-Bridge 25.11 and 25.09, 16 H100)."""
LINK_EFFICIENCY = 0.60
"""Of a connection's bandwidth in collectives; an assumption."""
DECODE_EFFICIENCY = 0.40
"""Of the memory bandwidth while an engine decodes; an assumption, from ML.ENERGY's Qwen3-30B-A3B on 2 H100 (9.6 ms an
iteration with 8 requests, 28 ms with 128)."""

RUNTIME_BYTES = 3 * GB
"""CUDA context, NCCL's buffers, cuBLAS workspaces of one process; an assumption."""
FRAGMENTATION = 0.05
"""Of what comes and goes (activations, buffers), lost between allocations; an assumption."""


def parse_bytes(text: str, option: str) -> int:
    """`80GB`, `141 gb`, `64GiB`.

    Raises:
        ConfigError: another form; names the option.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text}: expected a size such as 80GB or 75GiB")
    return round(float(match[1]) * (2**30 if match[2].lower() == "gib" else GB))


def hardware(name: str) -> Hardware:
    """Raises ConfigError for a GPU that is not in the table."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(f"--gpu {name}: not known; known are {', '.join(GPUS)}") from None
