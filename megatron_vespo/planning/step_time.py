"""Seconds of an optimizer step by phase, from floating-point operations, bytes and bandwidths. Estimates: what share of a
peak is reached is assumed (`hardware.py`), and nothing is taken to overlap."""

from dataclasses import dataclass

from megatron_vespo.architecture.compute_cost import attention_cost, matrix_parameters_per_token
from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import TrainConfig
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.engine_memory import EngineMemory, cache_bytes_per_token, weight_bytes
from megatron_vespo.planning.hardware import (
    DECODE_EFFICIENCY,
    DENSE_EFFICIENCY,
    EXPERT_EFFICIENCY,
    LINK_EFFICIENCY,
    Hardware,
)
from megatron_vespo.planning.state_bytes import DTYPE_BYTES
from megatron_vespo.planning.trainer_memory import IMBALANCE, TrainerMemory

FORWARD, BACKWARD = 2, 4
"""Floating-point operations of each parameter and token."""
OPTIMIZER_PASSES = 7
"""Times that optimizer state is read or written in a step: gradient, and twice master, two moments."""


@dataclass(frozen=True)
class Work:
    """What a step is on.

    Attributes:
        sequences: of one optimizer step.
        tokens: of each, prompt and response, on average.
    """

    sequences: int
    prompt: float
    response: float

    @property
    def tokens(self) -> float:
        return self.prompt + self.response


def training_seconds(trainer: TrainerMemory, work: Work, gpu: Hardware, gpus_per_node: int) -> list[Amount]:
    """Of one optimizer step: computation, pipeline bubble, and each kind of communication."""
    config, a = trainer.config, trainer.architecture
    policy, layout, width = config.policy, config.policy.layout, DTYPE_BYTES[config.model.dtype]
    tokens = work.sequences * work.tokens
    factor = FORWARD + BACKWARD + (FORWARD if policy.recompute.granularity == "full" else 0)
    amounts = _compute("computation", a, factor, tokens, work.tokens, policy.ranks, gpu)
    count = max(trainer.micro_batches, 1)
    bubble = (layout.pp - 1) / (count * layout.vpp)
    amounts.append(
        Amount(
            "pipeline bubble", total(amounts) * bubble, f"computation x ({layout.pp} - 1) / ({count} x {layout.vpp})"
        )
    )
    per_rank = tokens / policy.data_parallel_size / layout.cp
    passes = 3 if policy.recompute.granularity == "full" else 2
    layers = a.num_layers / layout.pp
    hidden = a.hidden_size * width
    if layout.tp > 1:
        # Two regions a layer, each entered by a gather and left by a scatter.
        moved = per_rank * layers * hidden * 4 * passes * (layout.tp - 1) / layout.tp
        amounts.append(_link("tensor-parallel exchange", moved, layout.tp, gpu, gpus_per_node))
    exchanging = layout.ep * layout.etp
    if a.is_moe and exchanging > 1:
        rows = per_rank / layout.tp * a.experts_per_token * IMBALANCE
        moved = rows * (sum(a.moe_layers) / layout.pp) * hidden * 2 * passes * (exchanging - 1) / exchanging
        amounts.append(_link("expert exchange", moved, exchanging, gpu, gpus_per_node))
    if layout.cp > 1:
        groups = 2 * a.num_query_groups // layout.tp * a.head_dim * width
        moved = per_rank * (layout.cp - 1) * layers * groups * passes
        amounts.append(_link("context exchange", moved, layout.tp * layout.cp, gpu, gpus_per_node))
    if policy.ranks > layout.tp * layout.pp:
        state = trainer.state
        moved = float(state.gradients + state.parameters)
        overlapped = " (half hidden by overlap)" if policy.overlap_gradient_reduction else ""
        moved *= 0.5 if overlapped else 1.0
        found = _link("data-parallel exchange", moved, policy.ranks // layout.pp, gpu, gpus_per_node)
        amounts.append(Amount(found.name, found.value, found.formula + overlapped))
    stepped = trainer.state.stepped * 4 * OPTIMIZER_PASSES
    amounts.append(
        Amount(
            "optimizer",
            stepped / gpu.memory_bandwidth,
            f"{stepped / 1e9:.1f} GB / {gpu.memory_bandwidth / 1e12:g} TB/s",
        )
    )
    return amounts


def scoring_seconds(config: TrainConfig, a: Architecture, work: Work, gpu: Hardware) -> list[Amount]:
    """Forward passes for log-probs, of one optimizer step's share."""
    passes = int(config.algorithm.old_policy == "proximal") + int(config.policy.reference is not None)
    if config.routing.replay == "R2" and config.algorithm.old_policy != "proximal":
        passes += 1
    if not passes:
        return [Amount("log-probs", 0.0, "old_policy behavior, no reference: none are computed")]
    tokens = work.sequences * work.tokens
    return _compute("log-probs", a, FORWARD * passes, tokens, work.tokens, config.policy.ranks, gpu)


def sync_seconds(config: TrainConfig, a: Architecture, gpu: Hardware) -> Amount:
    """Of one weight update: all weights once through one rank's link."""
    size = weight_bytes(a, DTYPE_BYTES[config.model.dtype], 1)
    link = gpu.network_bandwidth * LINK_EFFICIENCY
    return Amount(
        "weight sync", size / link, f"{size / 1e9:.1f} GB / ({gpu.network_bandwidth / 1e9:g} GB/s x {LINK_EFFICIENCY})"
    )


def decode_seconds(config: TrainConfig, a: Architecture, running: int, context: float, gpu: Hardware) -> Amount:
    """Of one iteration, in which each of `running` requests with `context` tokens gets a token."""
    engine = config.rollout.engine
    tp, width = engine.tensor_parallel, DTYPE_BYTES[engine.dtype or config.model.dtype]
    weights = weight_bytes(a, width, tp)
    if a.is_moe:
        experts = 3 * a.hidden_size * a.moe_ffn_hidden_size * a.num_experts * sum(a.moe_layers) // tp * width
        touched = 1 - (1 - a.experts_per_token / a.num_experts) ** running
        weights -= round(experts * (1 - touched))
    cache = running * context * cache_bytes_per_token(a, width, tp)
    read = (weights + cache) / (gpu.memory_bandwidth * DECODE_EFFICIENCY)
    compute = running * FORWARD * matrix_parameters_per_token(a) / tp / (gpu.flops * DENSE_EFFICIENCY)
    text = (
        f"({weights / 1e9:.1f} GB weights + {running} x {context:,.0f} tokens of cache) / "
        f"({gpu.memory_bandwidth / 1e12:g} TB/s x {DECODE_EFFICIENCY}) + products"
    )
    return Amount("decode iteration", read + compute, text)


def generation_seconds(config: TrainConfig, a: Architecture, work: Work, memory: EngineMemory, gpu: Hardware) -> Amount:
    """Of the responses of one optimizer step on all engines, all of them busy; at least the longest response alone, shared
    by the steps of a rollout batch."""
    engines = config.rollout.engine.count
    steps = config.algorithm.staleness if config.algorithm.asynchronous is None else config.algorithm.sync_every
    under_way = min(config.rollout.concurrent_groups * config.rollout.group_size, work.sequences * steps)
    running = max(1, min(memory.at_mean, -(-under_way // engines)))
    iteration = decode_seconds(config, a, running, work.prompt + work.response / 2, gpu).value
    seconds = work.sequences * work.response / engines / running * iteration
    alone = config.rollout.max_response_tokens * decode_seconds(config, a, 1, work.tokens, gpu).value / steps
    text = f"{work.sequences:,} x {work.response:,.0f} tokens / {engines} engines / {running} at once x {iteration * 1e3:.1f} ms"
    if alone > seconds:
        return Amount(
            "generation", alone, f"longest response alone, shared by {steps} steps; all together {seconds:.1f} s"
        )
    return Amount("generation", seconds, text)


def _compute(
    name: str, a: Architecture, factor: float, tokens: float, length: float, ranks: int, gpu: Hardware
) -> list[Amount]:
    experts = 3 * a.hidden_size * a.moe_ffn_hidden_size * a.experts_per_token * sum(a.moe_layers)
    dense = matrix_parameters_per_token(a) - experts
    attention = attention_cost(a) * matrix_parameters_per_token(a) * length
    amounts = []
    for kind, parameters, efficiency in (
        ("matrices and attention", dense + attention, DENSE_EFFICIENCY),
        ("experts", experts, EXPERT_EFFICIENCY),
    ):
        seconds = factor * parameters * tokens / ranks / (gpu.flops * efficiency)
        text = (
            f"{factor:g} x {parameters / 1e9:.2f} G x {tokens / 1e6:.2f} M tokens / {ranks} / "
            f"({gpu.flops / 1e12:g} TFLOP/s x {efficiency})"
        )
        if parameters:
            amounts.append(Amount(f"{name}: {kind}", seconds, text))
    return amounts


def _link(name: str, moved: float, ranks: int, gpu: Hardware, gpus_per_node: int) -> Amount:
    within = ranks <= gpus_per_node
    bandwidth = gpu.node_bandwidth if within else gpu.network_bandwidth
    where = "within nodes" if within else "between nodes"
    text = f"{moved / 1e9:.1f} GB {where} / ({bandwidth / 1e9:g} GB/s x {LINK_EFFICIENCY})"
    return Amount(name, moved / (bandwidth * LINK_EFFICIENCY), text)
