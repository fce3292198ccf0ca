"""A model's shape -> Megatron-Core's GPTModel, which gives log-probabilities of labels instead of their logits."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.config import ConfigError, ModelConfig, PolicyConfig
from megatron_vespo.policy.attention import PackedAttention
from megatron_vespo.policy.device import Device
from megatron_vespo.policy.head import token_log_probs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(GPTModel):
    """GPTModel whose forward pass gives float32 log-probs [t] of `labels` [1, t], taken at the sampling temperature.

    The output layer runs inside the forward pass, in chunks, so that no rank holds [t, vocabulary]. Without labels it
    gives logits, as GPTModel does. On a pipeline stage that is not the last it gives hidden states.
    """

    def __init__(self, *args: Any, temperature: float, head_chunk_tokens: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.head_chunk_tokens = head_chunk_tokens

    def _postprocess(self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **rest: Any):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, **rest)
        return token_log_probs(
            hidden_states.squeeze(1), self.output_weight(), labels.squeeze(0), self.temperature, self.head_chunk_tokens
        )

    def output_weight(self) -> Tensor:
        """[vocabulary, hidden]: the embedding's if they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight  # type: ignore[return-value]


class PackedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron's layer specs call and the weight's dtype from the config."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def build_model(
    architecture: Architecture, model: ModelConfig, policy: PolicyConfig, device: Device, temperature: float
) -> PolicyModel:
    """The model of this rank on its device. Weights of matrices are not initialised: load or `initialise` them.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    if architecture.num_experts % policy.layout.ep:
        raise ConfigError(
            f"policy.layout.ep: the model's {architecture.num_experts} experts don't divide by {policy.layout.ep}"
        )
    config = transformer_config(architecture, model, policy, device)
    built = PolicyModel(
        config,
        layer_spec(config, device),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,  # type: ignore[arg-type]
        temperature=temperature,
        head_chunk_tokens=policy.head_chunk_tokens,
    )
    return built.to(device.torch_device)


def transformer_config(
    architecture: Architecture, model: ModelConfig, policy: PolicyConfig, device: Device
) -> TransformerConfig:
    """Everything that TransformerConfig would otherwise choose by itself and that matters is named here."""
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
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=architecture.num_experts,
        moe_router_topk=architecture.experts_per_token,
        moe_ffn_hidden_size=architecture.moe_ffn_hidden_size,
        **_router_settings(architecture, policy),
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=device.transformer_engine,
        expert_model_parallel_size=policy.layout.ep,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Loss functions return a sum and a count; Megatron divides by the count of all ranks and micro-batches.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not device.is_cuda,
        persist_layer_norm=device.transformer_engine,
        bias_activation_fusion=device.is_cuda,
        bias_dropout_fusion=device.is_cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=device.fused_gradient_accumulation,
    )


def _router_settings(architecture: Architecture, policy: PolicyConfig) -> dict[str, Any]:
    """Softmax over the chosen experts' logits equals Qwen3's softmax over all, then division by the chosen sum."""
    return {
        "moe_router_pre_softmax": not architecture.normalise_topk,
        "moe_router_dtype": "fp32" if policy.router_dtype == "float32" else None,
        "moe_router_load_balancing_type": "aux_loss" if policy.router_aux_loss else "none",
        "moe_aux_loss_coeff": policy.router_aux_loss,
        "moe_z_loss_coeff": policy.router_z_loss or None,
    }


def layer_spec(config: TransformerConfig, device: Device) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where they can be had, else Megatron's own with packed attention and torch's norm."""
    if device.transformer_engine:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in block.layer_specs or []:
        parts: Any = layer.submodules
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        attention.q_layernorm = attention.k_layernorm = PackedRMSNorm
        parts.input_layernorm = parts.pre_mlp_layernorm = PackedRMSNorm
    block.layer_norm = PackedRMSNorm  # type: ignore[assignment]
    return block
