"""AdamW's state of every parameter, whole and in the parameter's own shape, however the optimizer holds it.

Megatron's distributed optimizer holds flat pieces of buckets. Its own conversion to whole tensors fails on torch's AdamW
and keeps the optimizers of dense and expert parameters apart, so that a run cannot change between EP 1 and EP > 1; here
every parameter's state is saved like the parameter itself, so any layout can load it.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "param"
"""The optimizer's own float32 copy of a parameter."""
States = dict[Parameter, dict[str, Tensor]]


@torch.no_grad()
def gather_states(optimizer: MegatronOptimizer) -> States:
    """Master and moments of this rank's parameters, float32 copies on the CPU.

    Of each parameter on one of the data-parallel ranks that share it (the first of their group); others return nothing
    of it. All ranks call it.
    """
    states: States = {}
    for part in _parts(optimizer):
        ensure_state(part)
        if isinstance(part, DistributedOptimizer):
            for bucket_states in _gathered_buckets(part):
                states |= bucket_states
        else:
            states |= {
                parameter: {name: tensor.detach().cpu().clone() for name, tensor in _own(part, parameter).items()}
                for parameter in _whole_parameters(part)
            }
    return states


def stepped_parameters(optimizer: MegatronOptimizer) -> list[Parameter]:
    """This rank's parameters, of some of which it may hold no piece."""
    found: list[Parameter] = []
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            found += [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        else:
            found += _whole_parameters(part)
    return found


@torch.no_grad()
def restore_states(optimizer: MegatronOptimizer, states: States, step: int) -> None:
    """Write what `gather_states` gave, of all of this rank's parameters, into the optimizer; nothing is communicated.

    A state without MASTER keeps the optimizer's own. `step`: optimizer steps done.
    """
    for part in _parts(optimizer):
        ensure_state(part)
        if isinstance(part, DistributedOptimizer):
            for _, _, ranges in _buckets(part):
                for parameter, where in ranges["param_map"].items():
                    piece = slice(where["param"].start, where["param"].end)
                    for name, tensor in part._get_main_param_and_optimizer_states(parameter).items():
                        if name in states[parameter]:
                            tensor.copy_(states[parameter][name].flatten()[piece])
        else:
            for parameter in _whole_parameters(part):
                for name, tensor in _own(part, parameter).items():
                    if name in states[parameter]:
                        tensor.copy_(states[parameter][name])
        _set_step(part, step)


def ensure_state(part: MegatronOptimizer) -> None:
    """AdamW makes its state at the first step; before it, all is 0."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            if MOMENTS[0] not in state:
                if isinstance(part.optimizer, torch.optim.Optimizer) and "step" not in group:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)


def _set_step(part: MegatronOptimizer, step: int) -> None:
    """torch counts for each parameter, Transformer Engine for each group."""
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = step
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            if "step" in state:
                state["step"] = torch.full_like(state["step"], step)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters; a stage may have nothing of one kind."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _whole_parameters(part: MegatronOptimizer) -> list[Parameter]:
    """The model's parameters, of an optimizer that holds no pieces."""
    if not isinstance(part, Float16OptimizerWithFloat16Params):
        return part.get_parameters()
    groups = [*part.float16_groups, *part.fp32_from_fp32_groups]
    return [parameter for group in groups for parameter in group]


def _own(part: MegatronOptimizer, parameter: Parameter) -> dict[str, Tensor]:
    """Of an optimizer that holds no pieces: its own tensors."""
    main = getattr(parameter, "main_param", None)
    main = parameter if main is None else main
    return {MASTER: main, **{name: part.optimizer.state[main][name] for name in MOMENTS}}


def _buckets(part: DistributedOptimizer) -> Iterator[tuple]:
    """(buffer, bucket, which pieces of its parameters this rank holds)."""
    for buffer, maps in zip(part.buffers, part.gbuf_ranges, strict=True):
        for ranges in maps.values():
            yield from ((buffer, bucket, own) for bucket, own in zip(buffer.buckets, ranges, strict=True))


def _gathered_buckets(part: DistributedOptimizer) -> Iterator[States]:
    group = part.data_parallel_group
    for buffer, bucket, ranges in _buckets(part):
        whole: dict[str, Tensor] = {}
        for name in (MASTER, *MOMENTS):
            flat = torch.zeros(
                bucket.grad_data.numel() // group.size(), dtype=torch.float32, device=bucket.grad_data.device
            )
            for parameter, where in ranges["param_map"].items():
                own = part._get_main_param_and_optimizer_states(parameter)[name]
                flat[where["gbuf_local"].start : where["gbuf_local"].end] = own
            pieces = [torch.empty_like(flat) for _ in range(group.size())] if group.rank() == 0 else None
            dist.gather(flat, pieces, group=group, group_dst=0)
            if pieces is not None:
                whole[name] = torch.cat(pieces).cpu()
        if whole:
            yield {
                parameter: {
                    name: flat[start - bucket.offset : end - bucket.offset].view(parameter.shape).clone()
                    for name, flat in whole.items()
                }
                for parameter, (start, end, _) in buffer.param_index_map.items()
                if parameter in bucket.params
            }
