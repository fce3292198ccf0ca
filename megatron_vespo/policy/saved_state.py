"""A policy's training state on disk: what is needed so that the next step is the step that would have followed.

Model, float32 masters and moments are a Megatron-Core `torch_dist` checkpoint, which any layout loads. What belongs to
one rank alone (its random generators) is a file of its own, read back only by a run of as many ranks.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Parameter

from megatron_vespo.policy.background_save import BackgroundSave
from megatron_vespo.policy.optimizer_state import (
    MASTER,
    MOMENTS,
    States,
    gather_states,
    restore_states,
    stepped_parameters,
)

WEIGHTS = "policy"
OPTIMIZER = "optimizer.state"
"""Prefix of the keys of masters and moments, as Megatron has it."""
Sharded = ShardedTensor | ShardedTensorFactory


@dataclass
class Saving:
    """A save of which this rank's files are being written while training goes on."""

    request: AsyncRequest
    thread: Thread

    def done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return not self.thread.is_alive()

    def finish(self) -> None:
        """Wait, then write the metadata together with all ranks, which must call this at the same time.

        Raises:
            RuntimeError: on every rank if the writing ended early on any; rank 0 names the causes.
        """
        self.thread.join()
        try:
            for finalize in self.request.finalize_fns:
                finalize()
        except CheckpointException as error:  # no Exception, in torch
            causes = [f"rank {rank}: {cause!r}" for rank, (cause, _) in error.failures.items()]
            raise RuntimeError("the state could not be saved: " + "; ".join(causes or ["see rank 0"])) from error


def begin_save(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, folder: Path, rank: int
) -> Saving:
    """Copy this rank's state and begin to write it into `folder`, which exists. All ranks call it at the same time.

    What is written is the state of now: it was copied when this returns.
    """
    save_file(random_state(), folder / _random_file(rank))
    model = _model_state(chunks)
    state: dict[str, Any] = {"model": _copied(model)}
    if optimizer_state := _like_model(model, gather_states(optimizer)):
        state["optimizer"] = optimizer_state
    (folder / WEIGHTS).mkdir(exist_ok=True)
    request = dist_checkpointing.save(state, str(folder / WEIGHTS), BackgroundSave(), async_sharded_save=True)
    assert request is not None
    thread = Thread(target=request.async_fn, name="save", daemon=True)
    thread.start()
    return Saving(request, thread)


def load_saved(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, folder: Path, rank: int, step: int
) -> None:
    """Bring back what `begin_save` wrote after `step` optimizer steps, into a model and an optimizer of any layout.

    Float32 masters of bfloat16 parameters are those that were saved, never made from the parameters. Random generators
    are restored where the file of this rank is there and the number of ranks is the same.

    Raises:
        CheckpointingException: a tensor is missing, or has another shape (from Megatron).
    """
    model = _model_state(chunks)
    wanted: States = {
        parameter: {name: torch.empty(parameter.shape, dtype=torch.float32) for name in saved_names(parameter)}
        for parameter in stepped_parameters(optimizer)
    }
    parameters = {name: parameter for name, _, parameter in _named(model)}
    loaded: Any = dist_checkpointing.load(
        {"model": model, "optimizer": _like_model(model, wanted)}, str(folder / WEIGHTS)
    )
    for number, chunk in enumerate(_bare(chunks)):
        chunk.load_state_dict(loaded["model"][str(number)], strict=True)
    restore_states(optimizer, {parameters[name]: states for name, states in loaded["optimizer"].items()}, step)
    own = folder / _random_file(rank)
    if own.exists():
        restore_random_state(load_file(own))


def saved_names(parameter: Tensor) -> tuple[str, ...]:
    """A float32 parameter is its own master."""
    return MOMENTS if parameter.dtype == torch.float32 else (MASTER, *MOMENTS)


def _model_state(chunks: Sequence[DistributedDataParallel]) -> dict[str, dict[str, Any]]:
    """Megatron's sharded tensors by chunk and by the name that the chunk has for them. Their data are the parameters."""
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    return {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(_bare(chunks))}


def _bare(chunks: Sequence[DistributedDataParallel]) -> list[MegatronModule]:
    """Names without the wrappers, as other programs expect them."""
    return unwrap_model(list(chunks))


def _named(model: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Sharded, Parameter]]:
    for number, chunk in model.items():
        for name, sharded in chunk.items():
            if isinstance(sharded, Sharded) and isinstance(sharded.data, Parameter):
                yield f"{number}.{name}", sharded, sharded.data


def _like_model(model: dict[str, dict[str, Any]], states: States) -> dict[str, dict[str, Sharded]]:
    """The optimizer's tensors, sharded and named as the parameters that they belong to."""
    found = {}
    for name, sharded, parameter in _named(model):
        if parameter in states:
            own = states[parameter]
            found[name] = {
                state: _other_data(sharded, f"{OPTIMIZER}.{state}", own[state]) for state in saved_names(parameter)
            }
    return found


def _other_data(sharded: Sharded, prefix: str, data: Tensor) -> Sharded:
    changes: dict[str, Any] = {"key": f"{prefix}.{sharded.key}", "data": data}
    if isinstance(sharded, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(sharded, **changes)


def _copied(model: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """In host memory: the next step changes the parameters while the copies are written."""

    def copied(value: Any) -> Any:
        return (
            replace(value, data=value.data.detach().to("cpu", copy=True))
            if isinstance(value, Sharded) and value.data is not None
            else value
        )

    return {number: {name: copied(value) for name, value in chunk.items()} for number, chunk in model.items()}


def _random_file(rank: int) -> str:
    return f"random_{rank}_of_{dist.get_world_size()}.safetensors"


def _tracker() -> CudaRNGStatesTracker:
    """Megatron's generators of tensor- and expert-parallel ranks."""
    tracker = get_cuda_rng_tracker()
    assert isinstance(tracker, CudaRNGStatesTracker)
    return tracker


def random_state() -> dict[str, Tensor]:
    """Of every generator of this process: Python's, NumPy's, torch's on CPU and GPU, Megatron's."""
    version, numbers, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    assert version == 3 and legacy["bit_generator"] == "MT19937"
    state = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_rest": torch.tensor([legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {f"megatron.{name}": s.clone() for name, s in _tracker().get_states().items()}


def restore_random_state(state: dict[str, Tensor]) -> None:
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    position, has_cached, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_cached), cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    prefix = "megatron."
    tracked = {name.removeprefix(prefix): s for name, s in state.items() if name.startswith(prefix)}
    _tracker().set_states(tracked)
