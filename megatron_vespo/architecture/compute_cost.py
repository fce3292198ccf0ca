"""Floating-point operations of a model, from its sizes."""

from megatron_vespo.architecture.hf_config import Architecture


def matrix_parameters_per_token(architecture: Architecture) -> int:
    """Parameters of the matrices that one token is multiplied with: of its chosen experts only, and the output layer."""
    a = architecture
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_query_groups)
    dense = 3 * a.hidden_size * a.ffn_hidden_size
    sparse = 3 * a.hidden_size * a.moe_ffn_hidden_size * a.experts_per_token + a.hidden_size * a.num_experts
    feed_forward = sum(sparse if moe else dense for moe in a.moe_layers)
    return a.num_layers * attention + feed_forward + a.vocab_size * a.hidden_size


def attention_cost(architecture: Architecture) -> float:
    """c in the relative cost n + c n^2 of a sequence of n positions.

    Causal attention multiplies each position's query and probabilities with n / 2 keys and values on average, a matrix
    parameter each position once: the factor for the backward pass is the same in both.
    """
    a = architecture
    return a.num_layers * a.num_attention_heads * a.head_dim / matrix_parameters_per_token(a)
