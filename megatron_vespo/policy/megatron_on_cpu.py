"""What Megatron-Core 0.16.1 needs to run without CUDA: each use of "the GPU" becomes the CPU; no number changes.

Installed once per process, and never where there is CUDA. The substitutions are few and as narrow as Megatron's source
allows: functions of torch.cuda that only raise on such a machine, the name `torch` inside four Megatron modules, and
four of Megatron's functions.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import megatron.core
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import utils as megatron_utils
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

SUPPORTED_VERSION = "0.16.1"
CPU = torch.device("cpu")
INSTALLED_MARK = "_megatron_vespo_on_cpu"


class UnsupportedMegatronVersion(RuntimeError):
    """The substitutions were written against another version's source."""


def install(cuda_available: bool) -> bool:
    """Substitute the CPU for the GPU in this process, unless there is CUDA or it was done before.

    Returns whether this call installed anything.

    Raises:
        UnsupportedMegatronVersion: CUDA is missing and megatron-core is not the version that this was written for.
    """
    if cuda_available:
        return False
    version = megatron.core.__version__
    if version != SUPPORTED_VERSION:
        raise UnsupportedMegatronVersion(
            f"running without CUDA needs megatron-core {SUPPORTED_VERSION}, found {version}: "
            f"install megatron-core=={SUPPORTED_VERSION}, or use a machine with CUDA"
        )
    if installed():
        return False
    _substitute_torch_cuda()
    _substitute_random_state()
    _substitute_device_literals()
    _substitute_type_names()
    _substitute_token_dispatch()
    _substitute_uneven_collectives()
    # Megatron decorates small functions with torch.compile, which on CPU means minutes of C++ compilation.
    torch._dynamo.config.disable = True
    setattr(torch.cuda, INSTALLED_MARK, True)
    return True


def installed() -> bool:
    """Whether this process runs with the substitutions."""
    return hasattr(torch.cuda, INSTALLED_MARK)


class _Stream:
    """Of torch.cuda.Stream and Event what Megatron calls. Work on a CPU is in order, so nothing is to be waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass


def _substitute_torch_cuda() -> None:
    stream = _Stream()
    substitutes: dict[str, Any] = {
        # The router, rotary embedding, linear layers and gradient buffers ask where to put a tensor.
        "current_device": lambda: CPU,
        # The all-to-all dispatcher copies its splits on a side stream; timers and group creation synchronize.
        "Stream": _Stream,  # a class, since others name it in type annotations
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *args, **kwargs: stream,
        "synchronize": lambda *args, **kwargs: None,
    }
    for name, substitute in substitutes.items():
        setattr(torch.cuda, name, substitute)
    # A tied embedding is moved to the GPU before the first and last pipeline stages agree on it.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _substitute_random_state() -> None:
    """The CPU generator plays the CUDA one's part.

    torch.cuda.manual_seed and Megatron's setter are queued until CUDA starts, for ever on a CPU build: without this
    the tracker's `fork()` would silently do nothing.
    """
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


class _TorchWithoutCuda(ModuleType):
    """The torch module, with factory functions that put on the CPU what is asked for on "cuda"."""

    def __init__(self) -> None:
        super().__init__(torch.__name__)
        self.tensor = _on_cpu(torch.tensor)
        self.zeros = _on_cpu(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _substitute_device_literals() -> None:
    """These modules say `device="cuda"` where others ask torch.cuda.current_device()."""
    substitute = _TorchWithoutCuda()
    for module in (schedules, clip_grads, optimizer, megatron_utils):
        setattr(module, "torch", substitute)  # noqa: B010


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Let `tensor.type()` answer "torch.cuda.FloatTensor" for a tensor on the CPU."""
    original = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original


def _with_cuda_type_names(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def _substitute_type_names() -> None:
    """The optimizers tell parameters apart, and check gradients, by type names that say "cuda"."""
    for kind in (distrib_optimizer.DistributedOptimizer, optimizer.Float16OptimizerWithFloat16Params):
        kind.__init__ = _with_cuda_type_names(kind.__init__)
    optimizer.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(optimizer.clip_grad_by_total_norm_fp32)


def _substitute_token_dispatch() -> None:
    # moe_utils imports te_general_gemm only with Transformer Engine but asks `is not None` without it: NameError.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # The all-to-all takes its splits as numpy; the original converts only tensors that are on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_numpy


def _splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _substitute_uneven_collectives() -> None:
    """gloo wants equal sizes where NCCL takes unequal ones: experts that are split (etp > 1) exchange what they got.

    Padded to the largest, the same rows arrive and the same sums are formed.
    """
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        parts = [input_.new_empty(longest, *input_.shape[1:]) for _ in output_split_sizes]
        dist.all_gather(parts, _with_rows(input_, longest), group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_uneven(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        longest = max(input_split_sizes)
        parts = [_with_rows(part, longest) for part in input_.split(input_split_sizes)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=group)
        return mine[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[n, ...] -> [rows, ...], contiguous, zeros below."""
    missing = rows - tensor.shape[0]
    return F.pad(tensor, (*[0, 0] * (tensor.dim() - 1), 0, missing)).contiguous()
