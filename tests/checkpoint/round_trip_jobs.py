"""What test_weights_survive_the_round_trip.py runs in its ranks: apart, because ranks must not import transformers."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from rank_models import joined, poisoned_model
from safetensors.torch import save_file

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.export import export_hf_folder
from megatron_vespo.checkpoint.gather import gather_hf_tensors
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.checkpoint.local_parameters import local_parameters
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError

TOKENS = torch.arange(2, 42) * 7 % 131


@dataclass(frozen=True)
class Case:
    stored: str
    computed: str
    tied: bool
    shard_size: str
    ep: int

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def load_gather_export(rank: int, world_size: int, port: int, ep: int, cases: list[Case], root: str) -> None:
    with joined(rank, world_size, port, {"ep": ep}) as device:
        for case in cases:
            folder = Path(root) / case.name
            source = folder / "source"
            architecture = check_folder(source)
            (model,) = poisoned_model(architecture, device, {"ep": ep}, case.computed)
            chunks = [wrapped(model)]
            locals_ = local_parameters(chunks, table_of(architecture), architecture)
            assert sorted(local.name for local in locals_) == sorted(name for name, _ in model.named_parameters())
            load_hf_weights(chunks, architecture, source)
            if architecture.tied_embeddings:
                load_folders_with_a_stored_output_layer(chunks, architecture, folder)
            gathered = [(name, tensor.clone()) for name, tensor in gather_hf_tensors(chunks, architecture)]
            export_hf_folder(chunks, architecture, source, folder / "export")
            export_hf_folder(
                chunks, architecture, source, folder / "export-float32", dtype=torch.float32, shard_bytes=30_000
            )
            refuse_wrong_uses(chunks, architecture, folder)
            consumed = sorted({name for local in locals_ for name in local.place.hf_names})
            result = {"order": [name for name, _ in gathered], "consumed": consumed}
            (folder / f"megatron-{rank}.json").write_text(json.dumps(result))
            save_file(dict(gathered) | {"logits": logits(chunks[0])}, folder / f"megatron-{rank}.safetensors")


def load_folders_with_a_stored_output_layer(chunks, architecture: Architecture, folder: Path) -> None:
    """Some tied folders on the hub hold lm_head.weight too. Equal it is accepted, different it is a contradiction."""
    load_hf_weights(chunks, architecture, folder / "same-head")
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_hf_weights(chunks, architecture, folder / "other-head")


def refuse_wrong_uses(chunks, architecture: Architecture, folder: Path) -> None:
    """Each on both ranks, so that none is left waiting for the other."""
    with pytest.raises(ConfigError, match="export: exists already"):
        export_hf_folder(chunks, architecture, folder / "source", folder / "export")
    for change, message in [
        (
            {"num_layers": 4, "moe_layers": (True,) * 4},
            r"decoder\.layers\.3\.mlp\.router\.weight: the model has no such parameter",
        ),
        (
            {"num_layers": 2, "moe_layers": (True,) * 2},
            r"decoder\.layers\.2\.mlp\.router\.weight: no entry of the mapping table",
        ),
        ({"moe_ffn_hidden_size": 25}, r"linear_fc1\.weight: shape \[48, 32\], the mapping table has \[50, 32\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            list(gather_hf_tensors(chunks, replace(architecture, **change)))
    with pytest.raises(RuntimeError, match=r"value of shape \[16, 2\], not \[16\]"):
        list(gather_hf_tensors(chunks, architecture, value=lambda p: p.detach().expand(2, -1).T if len(p) == 16 else p))
    with pytest.raises(
        RuntimeError, match=r"tensors of one dtype can be gathered, not of torch\.float16, torch\.float32"
    ):
        list(gather_hf_tensors(chunks, architecture, value=lambda p: p.float() if p.ndim == 1 else p.half()))


def wrapped(model):
    """As a policy wraps it: parameters and gradients live in Megatron's buffers."""
    inner = Float16Module(model.config, model) if model.config.bf16 else model
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, buffers, inner)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, len(TOKENS)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=len(TOKENS),
        max_seqlen_kv=len(TOKENS),
    )
    position_ids = torch.arange(len(TOKENS))[None]
    return model(TOKENS[None], position_ids, None, packed_seq_params=packed).float().reshape(len(TOKENS), -1)
