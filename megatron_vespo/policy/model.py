"""A model's shape -> Megatron-Core's GPTModel, which gives log-probabilities of labels instead of their logits."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import padded_vocabulary, require_fit
from megatron_vespo.config import ModelConfig, PolicyConfig
from megatron_vespo.policy.attention import PackedAttention
from megatron_vespo.policy.device import Device
from megatron_vespo.policy.experts import GroupedExperts
from megatron_vespo.policy.head import token_scores
from megatron_vespo.policy.norm import PackedRMSNorm
from megatron_vespo.policy.transformer_config import transformer_config
from megatron_vespo.routing.replay import ReplayRouter


class ScoringHead(ColumnParallelLinear):
    """The output layer. Given labels it returns their scores instead of logits (`head.token_scores`)."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, labels=None, **settings: Any):
        """`input_` [t, 1, h], with sequence parallelism this rank's [t/tp, 1, h]; `labels` [t] or None for logits."""
        if labels is None:
            return super().forward(input_, weight, *args, **settings)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        own = self.weight if weight is None else weight
        return token_scores(hidden.squeeze(1), own, labels, group=self.tp_group, **settings)  # type: ignore[arg-type]


class PolicyModel(GPTModel):
    """GPTModel that gives (log-probs, entropy) of `labels` [1, t], at the sampling temperature.

    Each is [t] float32, the same on all tensor-parallel ranks; entropy is None unless `with_entropy` is set. The output
    layer runs inside the forward pass, in chunks, so that no rank holds [t, vocabulary]. Without labels it gives logits,
    as GPTModel does. On a pipeline stage that is not the last it gives hidden states.

    Attributes:
        with_entropy: whether forward passes give the entropy too; may be changed between them.
    """

    def __init__(self, *args: Any, real_vocabulary: int, temperature: float, head_chunk_tokens: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.real_vocabulary = real_vocabulary
        self.temperature = temperature
        self.head_chunk_tokens = head_chunk_tokens
        self.with_entropy = False

    def setup_embeddings_and_output_layer(self) -> None:
        """GPTModel's constructor calls this once the output layer exists: ours takes its place first."""
        if self.post_process:
            self.output_layer = ScoringHead(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,  # type: ignore[arg-type]
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()

    def _postprocess(self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **rest: Any):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, **rest)
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(
            hidden_states,
            weight=shared,
            labels=labels.squeeze(0),
            temperature=self.temperature,
            chunk_tokens=self.head_chunk_tokens,
            vocab_size=self.real_vocabulary,
            with_entropy=self.with_entropy,
        )


def build_model(
    architecture: Architecture, model: ModelConfig, policy: PolicyConfig, device: Device, temperature: float
) -> list[PolicyModel]:
    """This rank's part of the model on its device, a chunk for each virtual pipeline stage. Weights are of no meaning yet.

    Raises:
        ConfigError: the layout does not fit the model, or needs what this machine lacks.
    """
    require_fit(architecture, policy)
    config = transformer_config(architecture, model, policy, device)
    chunks = []
    for stage in range(policy.layout.vpp):
        vp_stage = stage if policy.layout.vpp > 1 else None
        chunk = PolicyModel(
            config,
            layer_spec(config, device, vp_stage),  # type: ignore[arg-type]
            vocab_size=padded_vocabulary(architecture, policy),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,  # type: ignore[arg-type]
            rope_scaling=architecture.rope_scaling_factor is not None,
            rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
            vp_stage=vp_stage,
            real_vocabulary=architecture.vocab_size,
            temperature=temperature,
            head_chunk_tokens=policy.head_chunk_tokens,
        )
        chunks.append(chunk.to(device.torch_device))
    return chunks


def layer_spec(config: TransformerConfig, device: Device, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where they can be had, else Megatron's own with packed attention and torch's norm; both
    with routers that can replay.

    On a CPU the experts are our own: Megatron's take twice as long there.
    """
    if device.transformer_engine:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in block.layer_specs or []:
            _route_with_replay(layer)
        return block
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    for layer in block.layer_specs or []:
        parts: Any = layer.submodules
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = PackedRMSNorm
        parts.input_layernorm = parts.pre_mlp_layernorm = PackedRMSNorm
        if _route_with_replay(layer) and not device.is_cuda:
            parts.mlp.submodules.experts.module = GroupedExperts
    block.layer_norm = PackedRMSNorm  # type: ignore[assignment]
    return block


def _route_with_replay(layer: ModuleSpec) -> bool:
    """Give a layer's MoE our router; False: it has no experts."""
    parts: Any = layer.submodules
    if not hasattr(parts.mlp.submodules, "experts"):
        return False
    parts.mlp.submodules.router = ReplayRouter
    return True
