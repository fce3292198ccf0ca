"""What the ranks of a pool are asked to do. Each job joins the group, does its work and leaves."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.config import LayoutConfig, ModelConfig, OptimizerConfig, PolicyConfig, RecomputeConfig
from megatron_vespo.errors import RunError
from megatron_vespo.objective.metrics import LossMetrics
from megatron_vespo.policy.batch import MicroBatch
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.policy.result import StepResult, TokenScores
from megatron_vespo.rendezvous import listen


@dataclass
class Setup:
    """Everything about a policy but its rank. `weights`: by rank, Megatron's names; None: random."""

    architecture: Architecture
    weights: list[dict[str, Tensor]] | None = None
    ep: int = 1
    dtype: str = "float32"
    distributed_optimizer: bool = True
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3, gradient_clip=0.0))
    total_steps: int = 10
    temperature: float = 1.0
    head_chunk_tokens: int = 7
    router_aux_loss: float = 0.0
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)


def per_token(scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
    """Advantage-weighted likelihood: the denominator counts tokens."""
    lengths = micro_batch.cu_seqlens.diff().long()
    weights = micro_batch.advantages.repeat_interleave(lengths)
    numerator = -torch.where(micro_batch.label_mask, weights * scores.log_probs, 0.0).sum()
    count = micro_batch.label_mask.sum()
    metrics = LossMetrics(sums={"tokens": count}, sequences={"advantage": micro_batch.advantages})
    return numerator, count, metrics


def per_token_kept(scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
    """As `per_token`, and says of sequence `key` that its kernel lets KEPT[key] of the gradient through."""
    numerator, count, metrics = per_token(scores, micro_batch)
    parts = micro_batch.label_mask.split(micro_batch.cu_seqlens.diff().tolist())
    tokens = torch.stack([part.sum() for part in parts]).float()
    kept = torch.tensor([KEPT.get(key, 1.0) for key in micro_batch.keys])
    moved = kept * micro_batch.advantages.abs() * tokens
    metrics.sequences |= {"tokens": tokens, "abs_phi_advantage": moved}
    return numerator, count, metrics


KEPT = {0: 0.1, 1: 0.5, 2: 0.9, 3: 7.0, 4: 0.3, 5: 7.0, 6: 0.01, 7: 1.1}
"""Sequences 3 and 5 of the tests are masked whole: what their kernel would let through counts nowhere."""


def not_a_number(scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
    return scores.log_probs.sum() * torch.nan, micro_batch.label_mask.sum(), LossMetrics()


@contextlib.contextmanager
def joined(rank: int, world_size: int, port: int, setup: Setup) -> Iterator[MegatronPolicy]:
    policy = MegatronPolicy(
        setup.architecture,
        ModelConfig(path="unused", initialization="pretrained" if setup.weights else "random", dtype=setup.dtype),  # type: ignore[arg-type]
        PolicyConfig(
            ranks=world_size,
            layout=LayoutConfig(ep=setup.ep),
            head_chunk_tokens=setup.head_chunk_tokens,
            distributed_optimizer=setup.distributed_optimizer,
            router_aux_loss=setup.router_aux_loss,
            recompute=setup.recompute,
            step_timeout_seconds=60,
        ),
        setup.optimizer,
        setup.total_steps,
        seed=5,
        rank=rank,
        world_size=world_size,
        master=listen("127.0.0.1", port) if rank == 0 else ("127.0.0.1", port),
        temperature=setup.temperature,
    )
    try:
        if setup.weights:
            load(policy, setup.weights[rank])
        yield policy
    finally:
        policy.close()


def parameters(policy: MegatronPolicy) -> dict[str, torch.nn.Parameter]:
    return {name.replace("module.", ""): parameter for name, parameter in policy.model[0].named_parameters()}


def load(policy: MegatronPolicy, weights: dict[str, Tensor]) -> None:
    own = parameters(policy)
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    policy.weights_were_loaded()


def weights_of(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters(policy).items()}


def whole_gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    """main_grad of every parameter; what the distributed optimizer left spread over ranks is gathered."""
    chunk = policy.model[0]
    for buffers, group in (
        (chunk.buffers, parallel_state.get_data_parallel_group()),
        (chunk.expert_parallel_buffers, parallel_state.get_expert_data_parallel_group()),
    ):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            if chunk.ddp_config.use_distributed_optimizer:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                parts = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(parts, shard, group=group)
                bucket.grad_data.copy_(torch.cat(parts))
    return {name: parameter.main_grad.clone() for name, parameter in parameters(policy).items()}


def forward(rank: int, world_size: int, port: int, setup: Setup, batches: list[list[MicroBatch]]) -> dict:
    with joined(rank, world_size, port, setup) as policy:
        scores = policy.score(batches[rank])
        in_order = [scores[key].log_probs for micro_batch in batches[rank] for key in micro_batch.keys]
        return {"log_probs": in_order, "logits": [logits(policy, mb) for mb in batches[rank]]}


@torch.no_grad()
def logits(policy: MegatronPolicy, micro_batch: MicroBatch) -> Tensor:
    lengths = micro_batch.cu_seqlens
    longest = micro_batch.max_seqlen
    packing = PackedSeqParams("thd", lengths, lengths, max_seqlen_q=longest, max_seqlen_kv=longest)
    ids, positions = micro_batch.input_ids[None], micro_batch.position_ids[None]
    return policy.model[0](ids, positions, None, packed_seq_params=packing)[0]


def gradient_norm(
    rank: int, world_size: int, port: int, setup: Setup, batches: list[list[MicroBatch]]
) -> tuple[tuple[float, int], bool]:
    """And whether the weights are what they were."""
    with joined(rank, world_size, port, setup) as policy:
        before = weights_of(policy)
        found = policy.gradient_norm(batches[rank], per_token)
        after = weights_of(policy)
        return found, all(torch.equal(after[name], before[name]) for name in before)


@dataclass
class Trained:
    results: list[StepResult]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(rank: int, world_size: int, port: int, setup: Setup, steps: list[list[list[MicroBatch]]]) -> Trained:
    """`steps`: [step][rank][micro-batch]."""
    with joined(rank, world_size, port, setup) as policy:
        loss = per_token_kept if setup.optimizer.scale_by_kept_gradient else per_token
        results = [policy.train_step(step[rank], loss) for step in steps]
        return Trained(results, whole_gradients(policy), weights_of(policy))


def initial_weights(rank: int, world_size: int, port: int, setup: Setup) -> dict[str, Tensor]:
    with joined(rank, world_size, port, setup) as policy:
        return weights_of(policy)


def fail_on_nan(
    rank: int, world_size: int, port: int, setup: Setup, batches: list[list[MicroBatch]]
) -> tuple[str, bool]:
    """What the step said, and whether the weights stayed as they were."""
    with joined(rank, world_size, port, setup) as policy:
        before = weights_of(policy)
        message = said(lambda: policy.train_step(batches[rank], not_a_number))
        after = weights_of(policy)
        return message, all(torch.equal(before[name], after[name]) for name in before)


def unequal_counts(rank: int, world_size: int, port: int, setup: Setup, batches: list[list[MicroBatch]]) -> str:
    with joined(rank, world_size, port, setup) as policy:
        return said(lambda: policy.train_step(batches[rank][: rank + 1], per_token))


def said(action) -> str:
    try:
        action()
    except (RuntimeError, ValueError, RunError) as error:
        return str(error)
    return "nothing"
