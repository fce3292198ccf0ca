"""Megatron's torch_dist format, written by a thread of this process.

Megatron-Core writes with processes that it forks and a manager process that outlives a killed trainer. Here planning and
metadata are Megatron's, and torch's own writer puts the tensors on disk.
"""

from pathlib import Path

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, _wrap_exception
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult


class BackgroundSave(TorchDistSaveShardedStrategy):
    """For `dist_checkpointing.save(..., async_sharded_save=True)`: the request's function may run in any thread.

    The tensors must be on the CPU, and stay as they are until it has run.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path | str) -> AsyncRequest:
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _PlannedWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=1)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        (_, *plan), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(named, False),
            writer,  # type: ignore[arg-type]  # what is used of Megatron's writer is there
            None,
            0,
            planner=planner,
        )
        return AsyncRequest(writer.write, (), [lambda: save_state_dict_async_finalize(writer, *plan)])  # type: ignore[arg-type]


class _PlannedWriter(FileSystemWriter):
    """torch's writer in the steps that Megatron's planning asks for: prepare, write, then tell what was written."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._planned = (plan, planner)

    def write(self) -> None:
        try:
            self._written: list[WriteResult] | WRAPPED_EXCEPTION = self.write_data(*self._planned).wait()
        except Exception as error:
            self._written = _wrap_exception(error)  # raised on every rank when the save is finished

    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        return self._written
