"""RMS norm where Transformer Engine is missing."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron's layer specs call and the weight's dtype from the config.

    Its weight says whether each tensor-parallel rank sees only its share of the positions: Megatron then adds the
    ranks' gradients. (Megatron's own wrapper of torch's norm refuses sequence parallelism instead.)
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
