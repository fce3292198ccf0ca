"""The model as Hugging Face folders, written beside training."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.orchestration.checkpoints import EXPORTS, name_of
from megatron_vespo.orchestration.session import Session


@dataclass
class Pending:
    """An export that is being written."""

    step: int
    folder: Path
    start: int
    """`PolicyGroup.starts` of the processes that write it."""


class Exports:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._config = session.config.checkpoint
        self._pending: Pending | None = None
        session.writers.append(self)

    async def after_step(self) -> None:
        """Notice what is written by now, and begin a new export if it is due and not there.

        A resumed run calls it first, for an export that was being written when the run was interrupted.
        """
        await self.settle(wait=False)
        step, every = self._session.progress.step, self._config.export_every
        folder = self._session.folder / EXPORTS / name_of(step)
        if every > 0 and step > 0 and step % every == 0 and not folder.exists():
            await self.settle(wait=True)
            await self._session.policy.retried(lambda: self._copy(folder))
            self._pending = Pending(step, folder, self._session.policy.starts)

    async def _copy(self, folder: Path) -> None:
        await self._session.policy.on_all(
            "copy the model to be exported",
            lambda actor, _: actor.begin_export.remote(str(folder)),
            self._config.timeout_seconds,
        )

    async def begin_again(self, step: int) -> None:
        if self._pending is not None and self._pending.step == step:
            await self._copy(self._pending.folder)
            self._pending.start = self._session.policy.starts

    async def settle(self, *, wait: bool) -> None:
        """See whether the export that is being written is complete; `wait`: until it is."""
        if (pending := self._pending) is None:
            return
        if await self._session.policy.retried(lambda: self._ended(pending, wait)):
            self._pending = None

    async def _ended(self, pending: Pending, wait: bool) -> bool:
        """Whether it is written; `wait`: until it is. Or it never will be."""
        policy, seconds = self._session.policy, self._config.timeout_seconds
        if pending.start != policy.starts:  # a checkpoint of a later step was complete when the policy was lost
            told = "exported" if pending.folder.exists() else "not exported, its weights are gone:"
            self._session.console.event(f"{told} {pending.folder}")
            return True
        if not wait and not await policy.on_first("look at the export", lambda actor: actor.exported.remote()):
            return False
        await policy.on_all("finish the export", lambda actor, _: actor.finish_export.remote(), seconds)
        self._session.console.event(f"exported {pending.folder}")
        return True
