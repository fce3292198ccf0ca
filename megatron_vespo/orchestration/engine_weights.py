"""The trainer's weights to the engines: to all of them after steps, to one that was started again while others sample."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from megatron_vespo.orchestration.engine_calls import EnginesFailed
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.supervision import RunFailed
from megatron_vespo.orchestration.weight_updater import SyncReport
from megatron_vespo.rollout.client import EngineClient

T = TypeVar("T")

STOPPING_SECONDS = 10.0
"""To be sure that an engine failed, and to stop it, before it is started again."""


async def send_weights(
    session: Session, receivers: Callable[[], list[EngineClient]], held_since: float | None = None
) -> None:
    """As weight version `step`; the engines serve then. `held_since`: see `steps.sync_weights`."""
    session.console.phase("syncing weights")
    started = held_since or time.monotonic()
    report = await deliver(session, receivers)
    if report is None:
        return
    session.record(
        "sync",
        session.progress.step,
        {
            "weight_version": report.weight_version,
            "transport": report.transport,
            "engines": report.engines,
            "bytes": report.bytes,
            "buckets": report.buckets,
            "verified": report.verified,
            "mismatches": session.weights.mismatches,
            "time/pause": time.monotonic() - started,
            "time/sync": report.total_seconds,
            **{f"time/{name}": seconds for name, seconds in report.seconds.items()},
        },
    )


async def deliver(session: Session, receivers: Callable[[], list[EngineClient]]) -> SyncReport | None:
    """Engines that fail at it are taken out, and it begins again with those that are left, or that came back.

    None: no receiver is left, and others serve.
    """
    engines, step = session.engines, session.progress.step
    while True:
        if not (clients := receivers()):
            if engines.fleet.clients:
                return None
            engine = session.config.rollout.engine
            seconds = (engine.max_restarts + 1) * (engine.startup_timeout_seconds + STOPPING_SECONDS)
            await session.sampler.supervisor.wait(
                "wait for an engine to be started again", engines.came_back(), seconds, owner="engines"
            )
            continue
        try:
            report = await session.policy.retried(lambda clients=clients: session.weights.sync(step, clients))
            engines.hold_weights(clients, step)
            return report
        except EnginesFailed as failure:
            for client in clients:
                if client.name in failure.engines:
                    engines.failed(client, RunFailed(client.name, failure.engines[client.name]))


async def attended(session: Session, work: Awaitable[T], came_back: Callable[[], None] = lambda: None) -> T:
    """The result of `work`, which engines do while the trainer rests.

    An engine that was started again meanwhile gets the trainer's weights, and takes part. `came_back` is called then.
    """
    engines = session.engines
    task = asyncio.ensure_future(work)
    try:
        while True:
            if engines.waiting:
                await send_weights(session, lambda: engines.waiting)
                came_back()
            back = asyncio.ensure_future(engines.came_back())
            await asyncio.wait({task, back}, return_when=asyncio.FIRST_COMPLETED)
            back.cancel()
            if task.done():
                return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
