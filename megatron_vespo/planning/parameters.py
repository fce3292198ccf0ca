"""The parameters of one trainer rank, in the order in which Megatron-Core registers them, from sizes alone.

The order matters: where Megatron's gradient buffers are padded, and which of the optimizer's state is whose, depends on
it (`gradient_buffers.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import padded_vocabulary
from megatron_vespo.config import PolicyConfig


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank.

    Attributes:
        kind: what it belongs to: "embedding", "attention", "norm", "dense", "router", "experts" or "output".
        elements: of this rank's shard.
        expert_parallel: its gradient is reduced over the experts' data-parallel ranks.
        own_bucket: the tied embedding of a pipeline, which gradient buffers keep apart.
    """

    kind: str
    elements: int
    expert_parallel: bool = False
    own_bucket: bool = False


def chunk_layers(architecture: Architecture, policy: PolicyConfig, stage: int, chunk: int) -> range:
    """Layers that chunk `chunk` of pipeline stage `stage` holds."""
    layout = policy.layout
    per_chunk = architecture.num_layers // (layout.pp * layout.vpp)
    first = (chunk * layout.pp + stage) * per_chunk
    return range(first, first + per_chunk)


def chunk_parameters(
    architecture: Architecture, policy: PolicyConfig, stage: int, chunk: int, transformer_engine: bool
) -> list[Parameter]:
    """Of chunk `chunk` (of vpp) of pipeline stage `stage` on each of its ranks.

    `transformer_engine`: its layers hold norms in the matrix that follows, and all experts' first matrices before all
    their second ones.
    """
    layout, a = policy.layout, architecture
    first = stage == 0 and chunk == 0
    last = stage == layout.pp - 1 and chunk == layout.vpp - 1
    vocabulary = padded_vocabulary(a, policy) // layout.tp * a.hidden_size
    tied_copies = a.tied_embeddings and layout.pp > 1
    parameters = []
    if first:
        parameters.append(Parameter("embedding", vocabulary, own_bucket=tied_copies))
    of_kind = {moe: list(_layer(a, policy, moe, transformer_engine)) for moe in set(a.moe_layers)}
    for layer in chunk_layers(a, policy, stage, chunk):
        parameters += of_kind[a.moe_layers[layer]]
    if last:
        parameters.append(Parameter("norm", a.hidden_size))
    if last and not (a.tied_embeddings and first):
        parameters.append(Parameter("output", vocabulary, own_bucket=tied_copies))
    return parameters


def rank_parameters(
    architecture: Architecture, policy: PolicyConfig, stage: int, transformer_engine: bool
) -> list[list[Parameter]]:
    """As `chunk_parameters`, of each chunk."""
    chunks = range(policy.layout.vpp)
    return [chunk_parameters(architecture, policy, stage, chunk, transformer_engine) for chunk in chunks]


def _layer(a: Architecture, policy: PolicyConfig, moe: bool, fused: bool) -> Iterator[Parameter]:
    tp = policy.layout.tp
    norm = Parameter("norm", a.hidden_size)
    queries, keys = a.num_attention_heads * a.head_dim // tp, a.num_query_groups * a.head_dim // tp
    projection = Parameter("attention", queries * a.hidden_size)
    qkv = Parameter("attention", (queries + 2 * keys) * a.hidden_size)
    yield from (projection, norm, qkv) if fused else (norm, projection, qkv)
    if a.qk_norm:
        yield from [Parameter("norm", a.head_dim)] * 2
    yield norm
    if moe:
        yield from _experts(a, policy, fused)
    else:
        width = a.ffn_hidden_size // tp
        yield Parameter("dense", 2 * width * a.hidden_size)
        yield Parameter("dense", width * a.hidden_size)


def _experts(a: Architecture, policy: PolicyConfig, fused: bool) -> Iterator[Parameter]:
    layout = policy.layout
    width, local = a.moe_ffn_hidden_size // layout.etp, a.num_experts // layout.ep
    apart = layout.ep > 1
    into = Parameter("experts", 2 * width * a.hidden_size, expert_parallel=apart)
    out_of = Parameter("experts", width * a.hidden_size, expert_parallel=apart)
    yield Parameter("router", a.num_experts * a.hidden_size)
    if out_of.elements % 64 == 0 and not policy.overlap_gradient_reduction:
        # Nothing is padded or parted between them: one stands for all, which makes large models quick to plan.
        yield replace(into, elements=local * (into.elements + out_of.elements))
    elif fused:
        yield from [into] * local
        yield from [out_of] * local
    else:
        yield from [into, out_of] * local
