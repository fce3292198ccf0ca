"""The recorded routes of a step: which of them the trainer is given, and what they tell."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vespo.config import RoutingConfig
from megatron_vespo.orchestration.policy_group import RecordedRoutes
from megatron_vespo.policy.result import StepResult
from megatron_vespo.rollout.trajectory import Trajectory
from megatron_vespo.routing.agreement import agreement, summarised
from megatron_vespo.routing.routes import Routes

LAYER_FIGURES = ("same_set", "same_slots", "overlap", "margin", "largest_load", "unused")
"""Of `routing.agreement.Agreement`, for each MoE layer of a step."""


def step_routes(
    trajectories: Sequence[Trajectory], routing: RoutingConfig, *, measure: bool = True
) -> RecordedRoutes | None:
    """Of a step whose sequences have the keys 0 .. n - 1 in this order; None where nothing is recorded.

    Without replay the trainer still gets the engine's routes if they are recorded, and compares; `measure` False: it gets
    only what it replays.
    """
    if routing.replay == "off" and not measure:
        return None
    source = "R2" if routing.replay == "R2" else "R3"
    found = {key: trajectory.routes_of(source) for key, trajectory in enumerate(trajectories)}
    recorded = {key: routes for key, routes in found.items() if routes is not None}
    if not recorded:
        return None
    return RecordedRoutes(recorded, replay=routing.replay != "off", measure=measure)


def routing_figures(trajectories: Sequence[Trajectory], report: StepResult, routing: RoutingConfig) -> dict[str, float]:
    """For the metrics of a step; nothing where no routes were sent. Means over MoE layers."""
    if report.routing is None:
        return {}
    recorded = step_routes(trajectories, routing)
    assert recorded is not None
    positions = sum(len(t.prompt.token_ids) + len(t.response_ids) - 1 for t in trajectories)
    with_route = sum(int(routes.recorded.sum()) for routes in recorded.of_sequences.values())
    figures = summarised(agreement(report.routing), LAYER_FIGURES)
    return {
        **{f"routing/{name}": value for name, value in figures.items()},
        "routing/missing_share": 1 - with_route / positions,
        "routing/bytes_per_token_sent": sum(report.route_bytes_of_ranks) / positions,
        "routing/bytes_per_token_largest_rank": max(report.route_bytes_of_ranks) / positions,
    }


def by_layer(sums: Tensor) -> dict[str, NDArray[np.float64]]:
    """[MoE layers] each, for routing.jsonl."""
    measured = agreement(sums)
    return {name: getattr(measured, name) for name in LAYER_FIGURES}


def recording_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """For the metrics of a rollout batch: what came of routes, of the engine and of the trainer's own recording."""
    own = [t.proximal_routes for t in trajectories if t.proximal_routes is not None]
    routes = [t.engine_routes for t in trajectories if t.engine_routes is not None]
    figures = {}
    if own:
        figures["routing/bytes_per_token_gathered"] = sum(one.num_bytes for one in own) / sum(map(len, own))
    if not routes:
        return figures
    positions = sum(map(len, routes))
    masked = sum((Counter(one.masked) for one in routes), Counter())
    return figures | {
        "routing/missing_share": _share(routes, positions),
        "routing/bytes_per_token_wire": sum(one.wire_bytes for one in routes) / positions,
        "routing/bytes_per_token_stored": sum(one.num_bytes for one in routes) / positions,
        **{f"routing/masked/{reason}": count for reason, count in sorted(masked.items())},
    }


def _share(routes: Sequence[Routes], positions: int) -> float:
    return 1 - sum(int(one.recorded.sum()) for one in routes) / positions
