"""Are the engine's routes what they should be? Once at the start of a run, and a few trajectories of each batch."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_vespo.errors import RunError
from megatron_vespo.objective.diagnostics import difference_diagnostics
from megatron_vespo.orchestration.engine_weights import attended
from megatron_vespo.orchestration.mini_batches import response_log_probs, training_sequences
from megatron_vespo.orchestration.policy_group import RecordedRoutes
from megatron_vespo.orchestration.rescoring import engine_mismatch
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.supervision import all_of
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.rollout.generate import generate_group
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.trajectory import Group, Trajectory
from megatron_vespo.rollout.trajectory_file import write_trajectories
from megatron_vespo.routing.routes import Routes, least_agreement

PROBE_RESPONSES, PROBE_TOKENS = 8, 16
WITHOUT = "`routing.replay: off` with `routing.record: false` runs without the engine's routes"
FOLDER = "routing"


class ProbeFailed(RunError):
    """The engine's routes cannot be replayed."""


async def probe_engine_routes(session: Session) -> None:
    """Ask for the routes of a few responses to one prompt and compare them with the trainer's, which holds the same weights.

    Does nothing where no routes are recorded.

    Raises:
        ProbeFailed: none came, they are broken, or they are not the trainer's.
    """
    config, shape = session.config, session.routing_shape
    session.engine_probed = True
    if shape is None:
        return
    tokens = min(PROBE_TOKENS, config.rollout.max_response_tokens)
    (group,) = await sample_probe(session, "routing probe", 1, PROBE_RESPONSES, tokens)
    version = group.trajectories[0].oldest_weight_version
    routes = [t.engine_routes for t in group.trajectories if t.engine_routes is not None]
    masked = sorted({reason for one in routes for reason in one.masked})
    if masked:
        raise ProbeFailed(
            f"routing probe: the engine's routes cannot be used: {', '.join(masked)}. Its log is in the run's folder; "
            f"{WITHOUT}"
        )
    _, own = await session.policy.score_and_record(training_sequences(group.trajectories, "behavior"), version)
    found, places = agreeing_share(routes, own), sum(one.experts[..., 0].size for one in routes)
    engine, trainer_dtype = config.rollout.engine, config.model.dtype
    least = least_agreement(trainer_dtype, engine.dtype or trainer_dtype, engine.router_noise is not None)
    session.console.event(
        f"routing probe: engine and trainer choose the same experts at {found:.2%} of {places} "
        f"(position, layer){'' if least else '; not judged: the engine routes with noise (router_noise)'}"
    )
    if found < least:
        raise ProbeFailed(
            f"routing probe: engine and trainer choose the same experts at {found:.1%} of (position, layer), expected at "
            f"least {least:.0%}: layers or positions are not what they seem, or the two don't compute the same model; {WITHOUT}"
        )


async def sample_probe(session: Session, stream: str, prompts: int, samples: int, max_tokens: int) -> list[Group]:
    """Responses of one turn to the first held-out prompts, under exactly the weights that the trainer holds, as engines
    do since the last sync, cached prefixes included; not graded."""
    config = session.config
    of_rollout = Generation.of_rollout(
        config.rollout,
        stop_token_ids=session.sampler.tokenizer.stop_token_ids,
        vocab_size=session.sampler.vocab_size,
        run_seed=config.seed,
        stream=stream,
        weight_version=session.progress.step,
        cache_version=None,
        routes=session.routing_shape,
        environment=None,
    )
    generation = replace(
        of_rollout,
        samples=samples,
        max_response_tokens=max_tokens,
        concurrent_groups=prompts,
        response_length=None,
        cache_of_version_only=True,
    )
    fleet, seconds = session.sampler.fleet, config.rollout.engine.request_timeout_seconds
    waiting = all_of(*[generate_group(fleet, prompt, generation) for prompt in session.held_out[:prompts]])
    sampling = session.sampler.supervisor.wait(f"sample the {stream}", waiting, seconds, owner="engines")
    return await attended(session, sampling)


def agreeing_share(ones: Sequence[Routes], others: Sequence[Routes]) -> float:
    """Share of (position, layer), recorded in both, with the same experts; nan if there are none."""
    same = count = 0
    for one, other in zip(ones, others, strict=True):
        rows = one.recorded & other.recorded
        equal = (np.sort(one.experts[rows], -1) == np.sort(other.experts[rows], -1)).all(-1)
        same, count = same + int(equal.sum()), count + equal.size
    return same / count if count else float("nan")


async def probe_batch(session: Session, groups: list[Group]) -> dict[str, float]:
    """Score some trajectories of a batch, before its first step, natively and with the engine's routes.

    What was scored natively is kept in the run's folder `routing`, for tools/inspect_routing.py.

    Returns:
        For the metrics of the batch: mismatch with and without replay, and how engine and trainer agree; nothing where no
        routes are recorded.
    """
    shape = session.routing_shape
    if shape is None:
        return {}
    count = session.config.routing.probe_trajectories
    by_sample = sorted((t for group in groups for t in group.trajectories), key=lambda t: t.sample)
    probed = by_sample[:count]  # the first of each group, then the second
    routes = {key: t.engine_routes for key, t in enumerate(probed) if t.engine_routes is not None}
    session.console.phase("scoring: routing probe")
    sequences = training_sequences(probed, "behavior")
    version = session.progress.step
    native, own = await session.policy.score_and_record(sequences, version)
    replayed = await session.policy.score(sequences, routes=RecordedRoutes(routes))
    kept = [
        replace(t, proximal_routes=recorded, proximal_log_probs=response_log_probs(t, scores))
        for t, recorded, scores in zip(probed, own, native, strict=True)
    ]
    keep(kept, session.folder / FOLDER)
    same = agreeing_share(list(routes.values()), [own[key] for key in routes])
    return {
        **_difference(probed, native, "routing_probe/native"),
        **_difference(probed, replayed, "routing_probe/replayed"),
        **({"routing_probe/same_set": same} if np.isfinite(same) else {}),
    }


def keep(trajectories: list[Trajectory], folder: Path) -> None:
    """In place of those of the batch before, whole or not at all."""
    beside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write_trajectories(trajectories, beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _difference(trajectories: list[Trajectory], scores: list[TokenScores], prefix: str) -> dict[str, float]:
    scored = [
        replace(t, proximal_log_probs=response_log_probs(t, one)) for t, one in zip(trajectories, scores, strict=True)
    ]
    return difference_diagnostics(engine_mismatch(scored)[0], prefix)
