"""The batches of the optimizer steps since the last complete checkpoint, in files: a lost policy takes them again."""

import asyncio
import shutil
from pathlib import Path
from typing import Self

from megatron_vespo.errors import RunError
from megatron_vespo.rollout.trajectory import Trajectory
from megatron_vespo.rollout.trajectory_file import read_trajectories, write_trajectories

FOLDER = "journal"


class StepJournal:
    """Of one run, while its driver lives; a step is called by the number of steps before it. Use it as a context.

    Files rather than memory: a step of a large model has gigabytes of routes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)  # of a driver that died
        self._folder.mkdir()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writing is not None:
            await asyncio.wait({self._writing})
        shutil.rmtree(self._folder)

    async def add(self, step: int, trajectories: list[Trajectory]) -> None:
        """Begin to write the batch of `step`, which must not change any more; that of the step before is then written.

        Raises:
            RunError: that could not be written.
        """
        await self._written()
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, step, trajectories))

    async def read(self, step: int) -> list[Trajectory]:
        """Bit for bit what was added, in its order. Raises RunError as `add`, OSError if it cannot be read."""
        await self._written()
        return await asyncio.to_thread(read_trajectories, self._of(step))

    def drop_before(self, step: int) -> None:
        """Steps that no checkpoint will need any more."""
        for folder in self._folder.iterdir():
            if int(folder.name) < step:
                shutil.rmtree(folder)

    async def _written(self) -> None:
        if self._writing is None:
            return
        try:
            await self._writing
        except OSError as error:
            raise RunError(
                f"{self._folder}: the batch of a step could not be written, from which a lost policy would come back: "
                f"{error}. Make room there, or set policy.max_restarts to 0; --resume auto goes on"
            ) from error

    def _write(self, step: int, trajectories: list[Trajectory]) -> None:
        folder = self._of(step)
        folder.mkdir()
        write_trajectories(trajectories, folder)

    def _of(self, step: int) -> Path:
        return self._folder / str(step)
