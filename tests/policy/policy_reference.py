"""The independent computation: transformers' Qwen3-MoE, one sequence at a time, and its names in Megatron's layout."""

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.packing.batch import TrainingSequence


def reference_model(architecture: Architecture, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Random in every weight (norms too), large enough that routing and attention are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_query_groups,
        head_dim=architecture.head_dim,
        num_experts=architecture.num_experts,
        num_experts_per_tok=architecture.experts_per_token,
        moe_intermediate_size=architecture.moe_ffn_hidden_size,
        norm_topk_prob=architecture.normalise_topk,
        rms_norm_eps=architecture.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rotary_base},
        tie_word_embeddings=architecture.tied_embeddings,
        max_position_embeddings=architecture.max_position_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1.0 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def logits_of(model: Qwen3MoeForCausalLM, sequence: TrainingSequence) -> Tensor:
    """[n - 1, vocabulary], of one sequence alone."""
    tokens = torch.as_tensor(sequence.token_ids).long()
    return model(tokens[None, :-1], use_cache=False).logits[0]


def log_probs_of(model: Qwen3MoeForCausalLM, sequence: TrainingSequence, temperature: float = 1.0) -> Tensor:
    """[n - 1], of tokens 1 .. n - 1."""
    labels = torch.as_tensor(sequence.token_ids).long()[1:]
    scores = (logits_of(model, sequence) / temperature).log_softmax(-1)
    return scores.gather(1, labels[:, None]).squeeze(1)


def to_megatron(hf: dict[str, Tensor], architecture: Architecture, experts: range) -> dict[str, Tensor]:
    """Hugging Face tensors (weights, gradients, updates) under Megatron's local names, for the rank with `experts`."""
    out = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not architecture.tied_embeddings:
        out["output_layer.weight"] = hf["lm_head.weight"]
    for number in range(architecture.num_layers):
        theirs, ours = f"model.layers.{number}.", f"decoder.layers.{number}."
        out[ours + "input_layernorm.weight"] = hf[theirs + "input_layernorm.weight"]
        out[ours + "pre_mlp_layernorm.weight"] = hf[theirs + "post_attention_layernorm.weight"]
        out[ours + "self_attention.q_layernorm.weight"] = hf[theirs + "self_attn.q_norm.weight"]
        out[ours + "self_attention.k_layernorm.weight"] = hf[theirs + "self_attn.k_norm.weight"]
        out[ours + "self_attention.linear_proj.weight"] = hf[theirs + "self_attn.o_proj.weight"]
        out[ours + "self_attention.linear_qkv.weight"] = _interleave_heads(hf, theirs, architecture)
        out[ours + "mlp.router.weight"] = hf[theirs + "mlp.gate.weight"]
        for local, expert in enumerate(experts):
            place = f"{ours}mlp.experts.local_experts.{local}."
            out[place + "linear_fc1.weight"] = hf[theirs + "mlp.experts.gate_up_proj"][expert]
            out[place + "linear_fc2.weight"] = hf[theirs + "mlp.experts.down_proj"][expert]
    return out


def rank_weights(
    model: Qwen3MoeForCausalLM, architecture: Architecture, world_size: int, ep: int
) -> list[dict[str, Tensor]]:
    """Megatron's weights of each rank, experts spread over `ep` of them."""
    named = named_weights(model)
    return [to_megatron(named, architecture, experts_of(rank, architecture, ep)) for rank in range(world_size)]


def experts_of(rank: int, architecture: Architecture, ep: int) -> range:
    count = architecture.num_experts // ep
    return range(rank % ep * count, (rank % ep + 1) * count)


def _interleave_heads(hf: dict[str, Tensor], layer: str, architecture: Architecture) -> Tensor:
    """Megatron orders rows by group: its query heads, then its key, then its value."""
    d, groups = architecture.head_dim, architecture.num_query_groups
    per_group = architecture.num_attention_heads // groups * d
    q, k, v = (hf[f"{layer}self_attn.{kind}_proj.weight"] for kind in "qkv")
    rows = []
    for group in range(groups):
        rows += [
            q[group * per_group : (group + 1) * per_group],
            k[group * d : (group + 1) * d],
            v[group * d : (group + 1) * d],
        ]
    return torch.cat(rows)


def named_weights(model: Qwen3MoeForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def named_gradients(model: Qwen3MoeForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
