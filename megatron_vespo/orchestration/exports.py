"""The model as Hugging Face folders, written beside training."""

from pathlib import Path

from megatron_vespo.orchestration.checkpoints import name_of
from megatron_vespo.orchestration.session import Session

FOLDER = "exports"


class Exports:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._config = session.config.checkpoint
        self._pending: Path | None = None

    async def after_step(self) -> None:
        """Notice what is written by now, and begin a new export if it is due."""
        await self.settle(wait=False)
        step, every = self._session.progress.step, self._config.export_every
        if every > 0 and step % every == 0:
            await self.settle(wait=True)
            self._pending = self._session.folder / FOLDER / name_of(step)
            await self._session.policy.on_all(
                "copy the model to be exported",
                lambda actor, _: actor.begin_export.remote(str(self._pending)),
                self._config.timeout_seconds,
            )

    async def settle(self, *, wait: bool) -> None:
        """See whether the export that is being written is complete; `wait`: until it is."""
        if self._pending is None:
            return
        policy = self._session.policy
        if not wait and not await policy.on_first("look at the export", lambda actor: actor.exported.remote()):
            return
        seconds = self._config.timeout_seconds
        await policy.on_all("finish the export", lambda actor, _: actor.finish_export.remote(), seconds)
        self._session.console.event(f"exported {self._pending}")
        self._pending = None
