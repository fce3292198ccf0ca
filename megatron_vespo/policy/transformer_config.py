"""Our settings and a model's shape -> Megatron-Core's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import ConfigError, LayoutConfig, ModelConfig, PolicyConfig, RecomputeConfig
from megatron_vespo.policy.device import Device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEED_TRANSFORMER_ENGINE = ("moe_act", "layernorm")
"""Modules that only its layers can compute again: grouped experts, and norms whose output is let go."""


def transformer_config(
    architecture: Architecture, model: ModelConfig, policy: PolicyConfig, device: Device
) -> TransformerConfig:
    """Everything that TransformerConfig would otherwise choose by itself and that matters is named here.

    Raises:
        ConfigError: a setting that needs what this machine lacks.
    """
    dtype = DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_expert_settings(architecture, policy, device),
        **_parallel_settings(policy.layout, policy.token_dispatcher),
        **_recompute_settings(policy.recompute, device),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Loss functions return a sum and a count; Megatron divides by the count of all ranks and micro-batches.
        calculate_per_token_loss=True,
        # Megatron marks split parameters only where it initialises them, and without marks the gradient norm (and what
        # is clipped by it) counts a part of them.
        perform_initialization=True,
        use_cpu_initialization=not device.is_cuda,
        persist_layer_norm=device.transformer_engine,
        bias_activation_fusion=device.is_cuda,
        bias_dropout_fusion=device.is_cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=device.fused_gradient_accumulation,
    )


def _parallel_settings(layout: LayoutConfig, token_dispatcher: str) -> dict[str, Any]:
    """Interleaved stages talk one by one: with Megatron's batched exchange their numbers are wrong (0.16.1)."""
    interleaved = layout.vpp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1 and layout.sequence_parallel,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        # Micro-batches differ in length, and stages tell each other. With allgather all of a step's are equally long.
        "variable_seq_lengths": layout.pp > 1 and token_dispatcher != "allgather",
    }


def _expert_settings(architecture: Architecture, policy: PolicyConfig, device: Device) -> dict[str, Any]:
    """Softmax over the chosen experts' logits equals Qwen3's softmax over all, then division by the chosen sum."""
    if not any(architecture.moe_layers):
        # Megatron asks also models without experts for a dispatcher that takes micro-batches of different lengths.
        return {"num_moe_experts": None, "moe_token_dispatcher_type": "alltoall"}
    if policy.token_dispatcher == "flex" and not device.is_cuda:
        raise ConfigError("policy.token_dispatcher: flex needs CUDA (DeepEP); use alltoall")
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_layer_freq": [int(moe) for moe in architecture.moe_layers],
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.moe_ffn_hidden_size,
        "moe_router_pre_softmax": not architecture.normalise_topk,
        "moe_router_dtype": "fp32" if policy.router_dtype == "float32" else None,
        "moe_router_load_balancing_type": "aux_loss" if policy.router_aux_loss else "none",
        "moe_aux_loss_coeff": policy.router_aux_loss,
        "moe_z_loss_coeff": policy.router_z_loss or None,
        "moe_token_dispatcher_type": policy.token_dispatcher,
        "moe_grouped_gemm": device.transformer_engine,
    }


def _recompute_settings(recompute: RecomputeConfig, device: Device) -> dict[str, Any]:
    match recompute.granularity:
        case "none":
            return {}
        case "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": recompute.layers,
            }
        case "selective":
            lacking = [name for name in recompute.modules if name in NEED_TRANSFORMER_ENGINE]
            if lacking and not device.transformer_engine:
                raise ConfigError(
                    f"policy.recompute.modules: {', '.join(lacking)}: needs Transformer Engine's layers (CUDA, bfloat16)"
                )
            return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
