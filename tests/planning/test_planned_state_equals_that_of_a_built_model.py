"""Bytes of parameters, gradients and optimizer state, on every rank: planned from sizes, and counted on built models.

The sizes are odd on purpose, so that every rule of padding and every share of a bucket shows, in all but one model.
"""

from dataclasses import replace

import memory_jobs
import pytest

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.parity.layouts import parse_layout
from megatron_vespo.planning.state_bytes import rank_place, state_bytes

MOE = Architecture(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=97,
    hidden_size=40,
    num_layers=4,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=10,
    qk_norm=True,
    ffn_hidden_size=60,
    moe_layers=(True,) * 4,
    num_experts=4,
    experts_per_token=2,
    moe_ffn_hidden_size=12,
    norm_epsilon=1e-6,
    rotary_base=1e4,
    rope_scaling_factor=None,
    tied_embeddings=False,
    normalise_topk=True,
    max_position_embeddings=128,
)
MIXED_TIED = replace(MOE, moe_layers=(False, True, True, False), tied_embeddings=True)
DENSE = replace(
    MOE,
    architecture="Qwen3ForCausalLM",
    moe_layers=(False,) * 4,
    num_experts=0,
    experts_per_token=0,
    moe_ffn_hidden_size=0,
)
LLAMA_TIED = replace(DENSE, architecture="LlamaForCausalLM", qk_norm=False, tied_embeddings=True)

ALIGNED = replace(MIXED_TIED, hidden_size=64, moe_ffn_hidden_size=32)
"""Sizes as large models have them: the plan then takes all experts of a layer for one."""

QUICK = (
    ("tp=2,ep=2,dp=2", MOE, "bfloat16"),
    ("pp=2,vpp=2,ep=2", MIXED_TIED, "bfloat16"),
    ("dp=2", DENSE, "float32"),
)
OTHERS = (
    ("dp=1", LLAMA_TIED, "bfloat16"),
    ("dp=2,optimizer=plain", MOE, "bfloat16"),
    ("dp=2,optimizer=plain", DENSE, "float32"),
    ("ep=4", MOE, "float32"),
    ("etp=2,ep=2", MIXED_TIED, "bfloat16"),
    ("tp=2,etp=2,dp=2", MOE, "bfloat16"),
    ("pp=2,dp=2", LLAMA_TIED, "bfloat16"),
    ("cp=2,ep=4", MOE, "bfloat16"),
    ("tp=2,cp=2,ep=2", MIXED_TIED, "float32"),
    ("pp=4,overlap=parameters", MIXED_TIED, "bfloat16"),
    ("ep=2,dp=4", ALIGNED, "bfloat16"),
)


@pytest.mark.parametrize(
    ("layout", "architecture", "dtype"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
    ids=lambda value: value if isinstance(value, str) else value.architecture + "-tied" * value.tied_embeddings,
)
def test_every_byte_is_planned(ranks, layout, architecture, dtype):
    policy = parse_layout(layout).policy
    built = ranks.run(policy.ranks, memory_jobs.state, architecture, policy, dtype)
    for rank, found in enumerate(built):
        planned = state_bytes(architecture, policy, dtype, rank_place(policy, rank), transformer_engine=False)
        assert (planned.parameters, planned.gradients, planned.optimizer) == (
            found.parameters,
            found.gradients,
            found.optimizer,
        ), f"rank {rank}"
    if "plain" not in layout and policy.data_parallel_size > 1:
        assert found.optimizer < found.gradients * 3, "the optimizer's state is not spread: nothing was tested"
