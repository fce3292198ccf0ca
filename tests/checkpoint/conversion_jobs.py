"""What tests of the conversion run in ranks. Apart from the tests, because ranks must not import transformers."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from rank_models import joined, poisoned_model

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.checkpoint.local_parameters import local_parameters
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import PolicyConfig
from megatron_vespo.conversion.verify_logits import load_torch_dist
from megatron_vespo.parity import worker
from megatron_vespo.parity.case import Case


@dataclass(frozen=True)
class Keys:
    """What Megatron's own model asks for."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    objects: set[str]


def asked_for(rank: int, world_size: int, port: int, folder: str, metadata: dict) -> Keys:
    architecture = check_folder(folder)
    with joined(rank, world_size, port, {}) as device:
        (chunk,) = poisoned_model(architecture, device, {}, "bfloat16")
        tensors, objects = {}, set()
        for entry in chunk.sharded_state_dict(metadata=metadata).values():
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            for part in parts if isinstance(parts, list) else [parts]:
                if isinstance(part, ShardedTensor):
                    tensors[part.key] = part.global_shape, part.dtype
                else:
                    objects.add(part.unique_key)
        return Keys(tensors, objects)


def differing_after_load(
    rank: int, world_size: int, port: int, layout: dict[str, int], hf: str, megatron: str, multiple: int
) -> list[str]:
    """Parameters that Megatron's load fills otherwise than our loading of the Hugging Face folder does."""
    architecture = check_folder(hf)
    with joined(rank, world_size, port, layout) as device:
        ours, theirs = (poisoned_model(architecture, device, layout, "float32", multiple) for _ in range(2))
        load_hf_weights(ours, architecture, hf)
        load_torch_dist(theirs, megatron)
        table = table_of(architecture)
        pairs = zip(*(local_parameters(c, table, architecture) for c in (ours, theirs)), strict=True)
        return [a.name for a, b in pairs if not torch.equal(a.parameter, b.parameter)]


def save_with_megatron(
    rank: int, world_size: int, port: int, layout: dict[str, int], hf: str, megatron: str, metadata: dict
) -> None:
    """A checkpoint as training writes it: Megatron's own save, with something beside the weights."""
    multiprocessing.current_process().daemon = False  # Megatron's save starts processes, which the pool's may not
    architecture = check_folder(hf)
    with joined(rank, world_size, port, layout) as device:
        (chunk,) = poisoned_model(architecture, device, layout, "float32")
        load_hf_weights([chunk], architecture, hf)
        moments = torch.full((4, 4), float(rank))
        state = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg", moments, (0, rank, world_size))
        if rank == 0:
            Path(megatron).mkdir()
        torch.distributed.barrier()
        sharded = {"model": chunk.sharded_state_dict(metadata=metadata), "optimizer": state, "iteration": 7}
        dist_checkpointing.save(sharded, megatron, content_metadata=metadata)


def save_training_state(rank: int, world_size: int, port: int, case: Case, policy: PolicyConfig, folder: Path) -> None:
    """As a run writes its checkpoints, before the first step: the weights are the case's folder's."""
    with worker.joined(rank, world_size, port, case, policy) as trainer:
        trainer.begin_save(folder).finish()
