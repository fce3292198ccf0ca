"""What this process computes on. The only module that knows CUDA from CPU."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

from megatron_vespo.policy import megatron_on_cpu


@dataclass(frozen=True)
class Device:
    """Where tensors live, how ranks talk, and which kernel libraries are used."""

    torch_device: torch.device
    backend: str
    """Of torch.distributed: "nccl" or "gloo"."""
    transformer_engine: bool
    """Transformer Engine's layers; else Megatron's own with our attention."""
    fused_gradient_accumulation: bool
    """Apex's kernel that adds weight gradients to the fp32 buffer in the matmul."""

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"


def prepare_device(dtype: str) -> Device:
    """Choose the device of this process and make Megatron-Core ready for it.

    `dtype` is the parameters': Transformer Engine's attention over packed sequences takes half precision only.

    Ray shows each process only its own GPU, so that is always number 0.
    """
    cuda = torch.cuda.is_available()
    megatron_on_cpu.install(cuda_available=cuda)
    if not cuda:
        return Device(torch.device("cpu"), "gloo", transformer_engine=False, fused_gradient_accumulation=False)
    torch.cuda.set_device(0)
    return Device(
        torch.device("cuda", 0),
        "nccl",
        transformer_engine=HAVE_TE and dtype == "bfloat16",
        fused_gradient_accumulation=find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )
