"""The experts of a MoE layer on a CPU: all that a rank holds in two grouped products."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

ALIGNMENT_BYTES = 16
"""Of which torch's grouped product wants the rows of its operands to be a multiple; others take Megatron's loop."""


class GroupedExperts(SequentialMLP):
    """Megatron's SequentialMLP, its parameters and their names, without a loop over experts.

    Experts are gated with SiLU and have no bias: `transformer_config` asks for no others. Matrices may be shards (expert
    tensor parallelism), since Megatron's dispatcher gathers the tokens before and adds the partial results after.
    """

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, gates: Tensor) -> tuple[Tensor, None]:
        """Each token through its expert, times its gate.

        Args:
            tokens: [n, h], those of the first expert first.
            tokens_per_expert: [experts] int64, may be 0; their sum is n.
            gates: [n].

        Returns:
            [n, h], and None for the bias.
        """
        into, out_of = self._weights("linear_fc1"), self._weights("linear_fc2")
        if any(weights.shape[1] * weights.element_size() % ALIGNMENT_BYTES for weights in (into, out_of)):
            return super().forward(tokens, tokens_per_expert, gates)
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
        gated, linear = F.grouped_mm(tokens, into, offs=ends).chunk(2, dim=-1)
        inner = (F.silu(gated) * linear * gates.unsqueeze(-1)).to(tokens.dtype)
        return F.grouped_mm(inner, out_of, offs=ends), None

    def _weights(self, layer: str) -> Tensor:
        """[experts, inputs, outputs]"""
        return torch.stack([getattr(expert, layer).weight for expert in self.local_experts]).transpose(1, 2)
