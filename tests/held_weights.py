"""What engines hold, compared with checkpoints of the tiny models."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.rollout.fused_checksums import compare_ranks, expected_checksums


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def compared(found: list[dict[str, str]], tensors: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """Checksums of an engine's ranks with `tensors` of the model in `folder`."""
    architecture = read_architecture(folder)
    sizes = {"num_experts": architecture.num_experts, "kv_heads": architecture.num_query_groups, "ranks": len(found)}
    return compare_ranks(expected_checksums(tensors.items(), dtype="float32", **sizes), found)


def differences(engine, tensors: dict[str, torch.Tensor]) -> list[str]:
    return compared(engine.run(engine.client.weights_checksum()), tensors, engine.model_path)


def number_of_tensors(engine) -> int:
    """On all ranks of the engine."""
    return sum(len(rank) for rank in engine.run(engine.client.weights_checksum()))
