"""Does a parallel layout fit a model, and what does it ask of micro-batches? Decided from sizes alone.

What Megatron-Core would refuse with an assertion far from its cause, or would compute silently wrong, is refused here
with the reason. Constraints of the layout alone are in `config.policy`.
"""

import math

from megatron_vespo.architecture.compute_cost import attention_cost
from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import ConfigError, PolicyConfig
from megatron_vespo.packing.rules import PackingRules


def require_fit(architecture: Architecture, policy: PolicyConfig) -> None:
    """Raises ConfigError with every reason why the layout does not fit the model."""
    problems = [*_divisions(architecture, policy), *_expert_problems(architecture, policy)]
    if problems:
        raise ConfigError("\n".join(["policy.layout does not fit this model:", *(f"  {line}" for line in problems)]))


def padded_vocabulary(architecture: Architecture, policy: PolicyConfig) -> int:
    """Rows of the embedding and the output layer over all tensor-parallel ranks, with padding."""
    multiple = policy.layout.tp * policy.vocabulary_multiple
    return -(-architecture.vocab_size // multiple) * multiple


def _divisions(architecture: Architecture, policy: PolicyConfig) -> list[str]:
    layout = policy.layout
    moe, dense = any(architecture.moe_layers), not all(architecture.moe_layers)
    checks = [
        ("tp", layout.tp, "attention heads (num_attention_heads)", architecture.num_attention_heads, True),
        ("tp", layout.tp, "key/value heads (num_key_value_heads)", architecture.num_query_groups, True),
        ("tp", layout.tp, "feed-forward width (intermediate_size)", architecture.ffn_hidden_size, dense),
        ("etp", layout.etp, "expert width (moe_intermediate_size)", architecture.moe_ffn_hidden_size, moe),
        ("ep", layout.ep, "experts (num_experts)", architecture.num_experts, moe),
        ("pp * vpp", layout.pp * layout.vpp, "layers (num_hidden_layers)", architecture.num_layers, True),
    ]
    problems = [
        f"{axis} ({size}) does not divide the model's {number} {what}"
        for axis, size, what, number, concerned in checks
        if concerned and number % size
    ]
    stages, unit = layout.pp * layout.vpp, policy.recompute.layers
    if policy.recompute.granularity == "full" and architecture.num_layers % stages == 0:
        held = architecture.num_layers // stages
        if held % unit:
            problems.append(f"recompute.layers ({unit}) does not divide the {held} layers that are together on a rank")
    rows = padded_vocabulary(architecture, policy)
    if rows - rows // layout.tp >= architecture.vocab_size:
        problems.append(
            f"tp ({layout.tp}) with vocabulary_multiple {policy.vocabulary_multiple} pads the vocabulary of "
            f"{architecture.vocab_size} rows to {rows}, so that the last rank holds nothing but padding: use a smaller "
            "multiple"
        )
    return problems


def _expert_problems(architecture: Architecture, policy: PolicyConfig) -> list[str]:
    layout = policy.layout
    if not any(architecture.moe_layers):
        return [
            f"{axis} ({size}) splits experts, and this model has none: set it to 1"
            for axis, size in (("ep", layout.ep), ("etp", layout.etp))
            if size > 1
        ]
    problems = []
    if layout.ep == 1 and layout.etp != layout.tp:
        problems.append(
            f"etp ({layout.etp}) differs from tp ({layout.tp}) with ep 1: Megatron-Core then reduces the experts' "
            "gradients over the wrong ranks and trains wrong without saying so. Set etp to tp, or ep above 1"
        )
    if layout.tp > 1 and not layout.sequence_parallel:
        problems.append("sequence_parallel is needed for tensor parallelism on a model with experts")
    if (
        policy.recompute.granularity == "selective"
        and "mlp" in policy.recompute.modules
        and all(architecture.moe_layers)
    ):
        problems.append("recompute.modules: every layer has experts, so there is no dense mlp to recompute: use moe")
    return problems


def packing_rules(architecture: Architecture, policy: PolicyConfig) -> PackingRules:
    """What the layout asks of a step's micro-batches."""
    layout = policy.layout
    segment = 2 * layout.cp if layout.cp > 1 else 1  # context parallelism deals out 2 * cp chunks of each sequence
    sequence_parallel = layout.tp if layout.sequence_parallel else 1
    return PackingRules(
        ranks=policy.data_parallel_size,
        token_budget=policy.micro_batch_tokens * layout.cp,
        segment_multiple=segment,
        total_multiple=math.lcm(segment, layout.cp * sequence_parallel),
        # Megatron's interleaved schedule runs micro-batches in rounds of as many as there are stages.
        count_multiple=layout.pp if layout.vpp > 1 else 1,
        equal_totals=policy.token_dispatcher == "allgather" and architecture.is_moe,
        attention_cost=attention_cost(architecture),
    )
