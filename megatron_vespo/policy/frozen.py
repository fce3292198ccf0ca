"""Weights that stay as they are while the policy trains, computed with in the policy's own model."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class FrozenWeights:
    """A copy of this rank's parameters as they are now, on the device or in host memory.

    There is no second model: for a forward pass the copy takes the place of the parameters, so both go through the same
    layout, kernels and micro-batches.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], offload: bool):
        """`offload`: keep the copy in (pinned) host memory; it is brought to the device only while it computes."""
        self._offload = offload
        with torch.no_grad():
            self._copies = [self._copy(parameter) for parameter in _parameters(chunks)]

    def _copy(self, parameter: Tensor) -> Tensor:
        if not (self._offload and parameter.is_cuda):
            return parameter.detach().clone()
        return torch.empty_like(parameter, device="cpu", pin_memory=True).copy_(parameter)

    @contextlib.contextmanager
    def in_place_of(self, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """The same chunks' parameters are this copy inside, and themselves again afterwards. Don't train inside."""
        parameters = _parameters(chunks)
        current = [parameter.data for parameter in parameters]
        try:
            for parameter, copy in zip(parameters, self._copies, strict=True):
                parameter.data = copy.to(parameter.device, non_blocking=True)
            yield
        finally:
            for parameter, own in zip(parameters, current, strict=True):
                parameter.data = own


def _parameters(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]
