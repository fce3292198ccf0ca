"""Do transformers and Megatron-Core compute the same logits from the two sides of a conversion?"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.config import LayoutConfig, ModelConfig, PolicyConfig
from megatron_vespo.conversion.plan import fewest_ranks
from megatron_vespo.parity.pool import RankPool
from megatron_vespo.policy import parallel
from megatron_vespo.policy.device import prepare_device
from megatron_vespo.policy.model import PolicyModel, build_model
from megatron_vespo.rendezvous import listen

TOKENS = 48
SEED = 0


@dataclass(frozen=True)
class LogitComparison:
    largest_difference: float
    """Infinite where only one is NaN, or shapes differ."""
    largest_logit: float

    @property
    def relative(self) -> float:
        """The difference in parts of the largest logit, or of 1 if all are smaller: float32 rounds in such parts."""
        return self.largest_difference / max(1.0, self.largest_logit)


def compare_logits(hf: Path, megatron: Path, layout: LayoutConfig) -> LogitComparison:
    """Logits of `TOKENS` random tokens, both models in float32.

    Megatron's model runs in as many processes as `layout` takes (on a GPU, in one, whatever the layout) and loads the
    checkpoint with Megatron's own `dist_checkpointing.load`. The model must fit into memory in each engine, one after
    the other.
    """
    expected = transformers_logits(hf)
    if torch.cuda.is_available():
        layout = LayoutConfig()
    ranks = fewest_ranks(layout)
    with tempfile.TemporaryDirectory() as folder, RankPool(ranks, deadline_seconds=3600) as pool:
        pool.run(ranks, megatron_logits, str(hf), str(megatron), layout, folder)
        found = load_file(Path(folder) / "logits.safetensors")["logits"]
    if found.shape != expected.shape or bool((found.isnan() != expected.isnan()).any()):
        return LogitComparison(math.inf, float(expected.abs().max()))
    return LogitComparison(float((found - expected).abs().nan_to_num(0).max()), float(expected.abs().max()))


def tokens(hf: Path) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(read_architecture(hf).vocab_size, (TOKENS,), generator=generator)


@torch.no_grad()
def transformers_logits(hf: Path) -> Tensor:
    """[tokens, vocabulary] float32"""
    from transformers import AutoModelForCausalLM  # apart from Megatron, which is in other processes

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    return model(tokens(hf)[None]).logits[0]


@torch.no_grad()
def megatron_logits(
    rank: int, world_size: int, port: int, hf: str, megatron: str, layout: LayoutConfig, out: str | None = None
) -> Tensor | None:
    """In each rank of a pool: load the checkpoint, compute. [tokens, vocabulary] float32 on one rank, None elsewhere.

    `out`: a folder for logits.safetensors, instead of giving them back.
    """
    architecture = read_architecture(hf)
    policy = PolicyConfig(ranks=world_size, layout=layout)
    device = prepare_device("float32")
    master = listen("127.0.0.1", port) if rank == 0 else ("127.0.0.1", port)
    parallel.join(device, policy, rank=rank, world_size=world_size, master=master, seed=0)
    try:
        model = ModelConfig(path=hf, dtype="float32")
        (chunk,) = build_model(architecture, model, policy, device, temperature=1.0)
        load_torch_dist([chunk], megatron)
        logits = _run(chunk, tokens(Path(hf)).to(device.torch_device), architecture.vocab_size)
    finally:
        parallel.leave()
    if out is None or logits is None:
        return logits
    save_file({"logits": logits}, Path(out) / "logits.safetensors")
    return None


def load_torch_dist(chunks: Sequence[PolicyModel], folder: str) -> None:
    """Fill this rank's part of a model with a checkpoint's weights, through Megatron-Core."""
    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    sharded = {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}
    loaded: Any = dist_checkpointing.load(sharded, folder)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])


def _run(chunk: PolicyModel, input_ids: Tensor, vocabulary: int) -> Tensor | None:
    count = len(input_ids)
    bounds = torch.tensor([0, count], dtype=torch.int32, device=input_ids.device)
    packing = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=count, max_seqlen_kv=count)
    positions = torch.arange(count, device=input_ids.device)

    def step(_: object, model: PolicyModel):
        output = model(input_ids[None], positions[None], None, packed_seq_params=packing)
        return output, lambda logits, non_loss_data: logits

    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(()),
        model=[chunk],
        num_microbatches=1,
        seq_length=count,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not found:
        return None
    own = found[0].reshape(count, -1).float().contiguous()
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()  # type: ignore[assignment]
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    logits = torch.cat(parts, dim=1)[:, :vocabulary].contiguous().cpu()
    first = group.rank() == 0 and parallel_state.get_data_parallel_rank() == 0
    return logits if first else None
