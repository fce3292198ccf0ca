"""Memory of one GPU of an engine, what its KV cache holds, and host memory of the whole run."""

from dataclasses import dataclass

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import TrainConfig
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.state_bytes import DTYPE_BYTES
from megatron_vespo.planning.trainer_memory import TrainerMemory, bucket_bytes

ROUTE_ID_BYTES = 4
PREFILL_CHUNK = 8192
"""SGLang's default for large GPUs; with it its buffer of routes on the device is sized."""
GRAPH_BYTES = 2 * 10**9
"""CUDA graphs and workspaces of an engine's process; an assumption. They are outside of `memory_fraction`."""
TRAINER_PROCESS_BYTES = 6 * 10**9
ENGINE_PROCESS_BYTES = 8 * 10**9
"""Host memory of one process with its libraries; assumptions."""
TOKEN_BYTES = 16
"""Of a trained token without routes: its id, old log-prob, mask, weight version."""


@dataclass(frozen=True)
class EngineMemory:
    """Of each GPU of an engine.

    Attributes:
        amounts: on the device.
        routes: of SGLang's host memory for routes, of each process; 0 where none are recorded.
        cache_tokens: that the KV cache holds.
        at_longest, at_mean: requests that run at once if each is as long as may be, or half of it.
    """

    amounts: list[Amount]
    routes: Amount
    cache_tokens: int
    at_longest: int
    at_mean: int

    @property
    def peak(self) -> float:
        return total(self.amounts)


def weight_bytes(a: Architecture, width: int, tensor_parallel: int) -> int:
    """Of each rank: matrices are divided, norms and routers are whole."""
    groups = max(1, a.num_query_groups // tensor_parallel)
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads // tensor_parallel + 2 * groups)
    dense = 3 * a.hidden_size * a.ffn_hidden_size // tensor_parallel
    sparse = (
        3 * a.hidden_size * a.moe_ffn_hidden_size * a.num_experts // tensor_parallel + a.hidden_size * a.num_experts
    )
    layers = sum(sparse if moe else dense for moe in a.moe_layers)
    norms = a.num_layers * (2 * a.hidden_size + 2 * a.head_dim * a.qk_norm) + a.hidden_size
    tables = (1 if a.tied_embeddings else 2) * a.vocab_size * a.hidden_size // tensor_parallel
    return (a.num_layers * attention + layers + norms + tables) * width


def cache_bytes_per_token(a: Architecture, width: int, tensor_parallel: int) -> int:
    """On each rank."""
    return 2 * a.num_layers * max(1, a.num_query_groups // tensor_parallel) * a.head_dim * width


def engine_memory(config: TrainConfig, a: Architecture, gpu_memory: int) -> EngineMemory:
    engine = config.rollout.engine
    tp, width = engine.tensor_parallel, DTYPE_BYTES[engine.dtype or config.model.dtype]
    weights, of_token = weight_bytes(a, width, tp), cache_bytes_per_token(a, width, tp)
    room = max(0, gpu_memory * engine.memory_fraction - weights)
    tokens = int(room // of_token)
    if engine.max_total_tokens is not None:
        tokens = min(tokens, engine.max_total_tokens)
    slot, formula = bucket_bytes(config, a)
    amounts = [
        Amount("weights", weights, f"matrices / {tp}, norms and routers whole, x {width}"),
        Amount(
            "KV cache",
            tokens * of_token,
            f"{tokens:,} tokens x {of_token:,} (2 x {a.num_layers} x {of_token // (2 * a.num_layers * width)} x {width}); "
            f"{gpu_memory / 1e9:g} GB x memory_fraction {engine.memory_fraction} less weights"
            + (", at most max_total_tokens" if engine.max_total_tokens else ""),
        ),
        Amount("sync bucket", slot, formula),
        Amount("CUDA graphs, workspaces", GRAPH_BYTES, "assumed"),
    ]
    routes = Amount("routes", 0, "not recorded")
    if config.routing.engine_records and a.is_moe:
        of_route = a.num_layers * a.experts_per_token * ROUTE_ID_BYTES
        shape = f"{a.num_layers} layers x {a.experts_per_token} x int32"
        routes = Amount("routes", tokens * of_route, f"{tokens:,} cache tokens x {shape}")
        rows = max(PREFILL_CHUNK, engine.max_running_requests or 0)
        amounts.append(Amount("routes of a batch", rows * of_route, f"{rows:,} rows x {shape}"))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    limit = engine.max_running_requests or tokens
    return EngineMemory(
        amounts, routes, tokens, min(limit, tokens // longest), min(limit, tokens // max(1, longest // 2))
    )


def host_memory(
    config: TrainConfig, a: Architecture, trainers: list[TrainerMemory], engine: EngineMemory, gpus_per_node: int
) -> list[Amount]:
    """Of the node that has most: one full of trainer ranks, or one full of engines; with the driver's share of it."""
    policy, rollout = config.policy, config.rollout
    of_rank = TRAINER_PROCESS_BYTES + max(t.state.host_optimizer for t in trainers)
    width = DTYPE_BYTES[config.model.dtype]
    if policy.reference is not None and policy.reference.offload:
        of_rank += max(t.state.elements for t in trainers) * width
    ranks = min(gpus_per_node, policy.ranks)
    engine_gpus = min(gpus_per_node, rollout.engine.count * rollout.engine.tensor_parallel)
    amounts = [
        Amount(
            "trainer processes", ranks * of_rank, f"{ranks} x {of_rank / 1e9:.1f} GB (6 GB assumed, offloaded state)"
        ),
        Amount(
            "engine processes",
            engine_gpus * (ENGINE_PROCESS_BYTES + engine.routes.value),
            f"{engine_gpus} x (8 GB assumed + routes {engine.routes.value / 1e9:.2f} GB: {engine.routes.formula})",
        ),
    ]
    # Asynchronous runs have up to S + 1 steps' groups under way or waiting.
    steps = config.algorithm.max_staleness + 1
    groups = steps * config.algorithm.prompts_per_step
    sequences = groups * rollout.group_size
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    of_token = TOKEN_BYTES
    if config.routing.replay != "off" or config.routing.record:
        of_token += sum(a.moe_layers) * a.experts_per_token * (1 if a.num_experts <= 256 else 2)
    amounts.append(
        Amount(
            "trajectories (driver)",
            sequences * longest * of_token,
            f"{sequences:,} x {longest:,} tokens at most x {of_token} bytes, {steps} steps of them",
        )
    )
    share = config.algorithm.prompts_per_step * rollout.group_size * longest * of_token
    amounts.append(Amount("Ray object store", share, "one step's sequences, in shared memory"))
    return amounts
