"""Random weights for training from nothing: the same values in every layout, since each tensor has its own seed."""

import hashlib
import math
import re

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.policy.model import PolicyModel

STANDARD_DEVIATION = 0.02
LOCAL_EXPERT = re.compile(r"(?<=experts\.local_experts\.)\d+(?=\.)")
GROUPED_EXPERT = re.compile(r"(?<=experts\.linear_fc[12]\.weight)\d+$")


@torch.no_grad()
def initialise(model: PolicyModel, seed: int) -> None:
    """Fill every weight: norms with 1, matrices with a normal distribution of standard deviation 0.02.

    Matrices that write into the residual stream get 0.02 / sqrt(2 layers), as in GPT-2 and Megatron. The same model and
    seed give the same values whatever the expert-parallel size.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        parameter.copy_(_normal(parameter, whole_model_name(name, model.config), model.config, seed))


def _normal(like: Tensor, name: str, config: TransformerConfig, seed: int) -> Tensor:
    writes_residual = ".linear_proj." in name or ".linear_fc2." in name
    deviation = STANDARD_DEVIATION / (math.sqrt(2 * config.num_layers) if writes_residual else 1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(like.shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)


def whole_model_name(name: str, config: TransformerConfig) -> str:
    """A parameter's name with its expert's number in the whole model, "…experts.3.linear_fc1.weight"."""
    experts_here = config.num_moe_experts // config.expert_model_parallel_size  # type: ignore[operator]
    first = parallel_state.get_expert_model_parallel_rank() * experts_here
    local, grouped = LOCAL_EXPERT.search(name), GROUPED_EXPERT.search(name)
    if local:
        return LOCAL_EXPERT.sub(str(first + int(local[0])), name).replace("local_experts.", "")
    if grouped:
        block, layer = name[: grouped.start()].rsplit("linear_fc", 1)
        return f"{block}{first + int(grouped[0])}.linear_fc{layer}"
    return name
