"""One rank's experts: built as Megatron builds them, and run."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.config import PolicyConfig
from megatron_vespo.policy import parallel
from megatron_vespo.policy.device import prepare_device
from megatron_vespo.policy.experts import GroupedExperts
from megatron_vespo.rendezvous import listen


def run_experts(
    rank: int,
    world_size: int,
    port: int,
    cases: list[tuple[list[Tensor], list[Tensor], list[int], Tensor, Tensor, Tensor]],
) -> list[list[Tensor]]:
    """Of each case the output and the gradients of tokens, gates, first and second matrices.

    A case: matrices into the experts, matrices out of them, tokens per expert, tokens, gates, gradient of the output.
    """
    parallel.join(
        prepare_device("float32"),
        PolicyConfig(step_timeout_seconds=60),
        rank=rank,
        world_size=world_size,
        master=listen("127.0.0.1", port),
        seed=1,
    )
    try:
        return [_run(*case) for case in cases]
    finally:
        parallel.leave()


def _run(
    first: list[Tensor], second: list[Tensor], counts: list[int], tokens: Tensor, gates: Tensor, gradient: Tensor
) -> list[Tensor]:
    hidden, inner = second[0].shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        num_moe_experts=len(first),
        moe_ffn_hidden_size=inner,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        params_dtype=tokens.dtype,
    )
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = GroupedExperts(len(first), config, parts, pg_collection=get_default_pg_collection())
    layers = [[getattr(expert, name) for expert in experts.local_experts] for name in ("linear_fc1", "linear_fc2")]
    with torch.no_grad():
        for layer, matrices in zip(layers, (first, second), strict=True):
            for linear, matrix in zip(layer, matrices, strict=True):
                linear.weight.copy_(matrix)
    leaves = [tokens.requires_grad_(), gates.requires_grad_()]
    output, bias = experts(*leaves[:1], torch.tensor(counts), leaves[1])
    assert bias is None
    output.backward(gradient)
    matrices = [torch.stack([linear.weight.grad for linear in layer]) for layer in layers]
    return [output.detach(), *(leaf.grad for leaf in leaves), *matrices]  # type: ignore[list-item]
