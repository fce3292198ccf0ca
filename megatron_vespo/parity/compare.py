"""A layout's run against one process's: loss, gradient norm, metrics, every gradient, every weight, every route."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vespo.parity.worker import RankRecord
from megatron_vespo.policy.result import StepResult, merge

LOSS_TOLERANCE = 1e-5
"""Relative, of the loss and the gradient norm, at each step."""
METRIC_TOLERANCE = 1e-4
"""Relative, of each metric at each step. A log W is a sum of differences of log-probs that are nearly equal."""
GRADIENT_TOLERANCE = 1e-5
"""Norm of a tensor's difference / norm of the tensor's gradient, at the first step."""
UPDATE_TOLERANCE = 1e-3
"""Norm of a tensor's difference / norm of the tensor's change, over all steps."""

Place = tuple[int, int, int]
"""Layer, key of a sequence, position in it."""
Verdict = Literal["equal", "DIFFERENT", "inconclusive"]


@dataclass(frozen=True)
class Run:
    """One layout's run, put together from its ranks."""

    results: list[StepResult]
    routes: list[dict[Place, int]]
    """Of each step: (layer, key, position) -> experts used, as bits."""
    recomputed_otherwise: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Worst:
    """The largest difference of its kind, relative, and where it is."""

    value: float
    where: str


NOTHING = Worst(0.0, "nothing to compare")


@dataclass(frozen=True)
class Comparison:
    verdict: Verdict
    loss: Worst
    gradient_norm: Worst
    metrics: Worst
    gradient: Worst
    update: Worst
    routes_changed: int
    """Choices of experts that differ from one process's, over all steps, layers and positions."""
    not_replayed: int
    """Recorded choices that were not used as they are, in the forward pass or in recomputation."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def assemble(records: list[RankRecord]) -> Run:
    """Raises ValueError if two ranks tell different routes of one position, or positions are missing on some layer."""
    steps = range(len(records[0].results))
    return Run(
        results=[merge([record.results[step] for record in records]) for step in steps],
        routes=[_merge_routes([record.routes[step] for record in records]) for step in steps],
        recomputed_otherwise=sum(record.recomputed_otherwise for record in records),
        gradients=records[0].gradients,
        weights=records[0].weights,
    )


def _merge_routes(parts: list[Tensor]) -> dict[Place, int]:
    merged: dict[Place, int] = {}
    for layer, key, position, experts in torch.cat(parts).tolist():
        if merged.setdefault((layer, key, position), experts) != experts:
            raise ValueError(f"two ranks chose other experts for layer {layer}, sequence {key}, position {position}")
    return merged


def compare(run: Run, one: Run, start: Mapping[str, Tensor], recorded: list[dict[Place, int]]) -> Comparison:
    """`one` is the single process's run; `start` the weights from which both set out; `recorded` the routes that each
    step had to use, empty where routers choose.

    Once a position is sent to other experts, what follows is another computation: what came before is still judged,
    and if that holds the comparison is inconclusive, not passed.
    """
    changed = [_changed(mine, theirs) for mine, theirs in zip(run.routes, one.routes, strict=True)]
    comparable = next((step for step, count in enumerate(changed) if count), len(changed))
    steps = list(enumerate(zip(run.results, one.results, strict=True), start=1))[:comparable]
    loss = _worst({f"step {n}": (a.loss, b.loss) for n, (a, b) in steps})
    gradient_norm = _worst({f"step {n}": (a.gradient_norm, b.gradient_norm) for n, (a, b) in steps})
    metrics = _worst_metric(steps)
    gradient = _worst_tensor(run.gradients, one.gradients, one.gradients)
    changes = {name: weight - start[name] for name, weight in one.weights.items()}
    update = _worst_tensor(run.weights, one.weights, changes)
    different = (
        max(loss.value, gradient_norm.value) > LOSS_TOLERANCE
        or metrics.value > METRIC_TOLERANCE
        or (comparable > 0 and gradient.value > GRADIENT_TOLERANCE)
    )
    used = zip(run.routes, recorded, strict=True)
    not_replayed = run.recomputed_otherwise + sum(
        mine.get(place) != experts for mine, theirs in used for place, experts in theirs.items()
    )
    different = different or not_replayed > 0
    if comparable == len(changed):
        different = different or update.value > UPDATE_TOLERANCE
    verdict: Verdict = "DIFFERENT" if different else "inconclusive" if any(changed) else "equal"
    return Comparison(verdict, loss, gradient_norm, metrics, gradient, update, sum(changed), not_replayed)


def _worst(pairs: Mapping[str, tuple[float, float]]) -> Worst:
    found = [Worst(_relative(mine, theirs), where) for where, (mine, theirs) in pairs.items()]
    return max(found, key=_size, default=NOTHING)


def _relative(mine: float, theirs: float) -> float:
    difference = abs(mine - theirs) / max(abs(theirs), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def _size(worst: Worst) -> float:
    return worst.value


def _worst_metric(steps: list[tuple[int, tuple[StepResult, StepResult]]]) -> Worst:
    """Sums relative to themselves; values of sequences relative to the largest of their kind."""
    found = []
    for number, (mine, theirs) in steps:
        if mine.keys != theirs.keys or mine.denominator != theirs.denominator:
            return Worst(math.inf, f"step {number}: other sequences, or another denominator")
        # A sum of terms that cancel (k1) is as exact as its terms are, not as itself.
        smallest = 1e-3 * max(abs(value) for value in theirs.sums.values())
        for name, value in theirs.sums.items():
            difference = abs(mine.sums[name] - value) / max(abs(value), smallest)
            found.append(Worst(difference if math.isfinite(difference) else math.inf, f"step {number}: {name}"))
        if mine.routing is not None and theirs.routing is not None:
            found.append(Worst(_furthest(mine.routing, theirs.routing), f"step {number}: agreement of routes"))
        for name, values in theirs.sequences.items():
            found.append(Worst(_furthest(mine.sequences[name], values), f"step {number}: {name}"))
    return max(found, key=_size, default=NOTHING)


def _furthest(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    largest = theirs.abs().max().item()
    return _relative(largest + (mine - theirs).abs().max().item(), largest)


def _worst_tensor(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> Worst:
    if mine.keys() != theirs.keys():
        return Worst(math.inf, f"other tensors: {', '.join(sorted(mine.keys() ^ theirs.keys())[:3])}")
    found = []
    for name, expected in theirs.items():
        difference = (mine[name].double() - expected.double()).norm() / sizes[name].double().norm()
        found.append(Worst(difference.item() if difference.isfinite() else math.inf, name))
    return max(found, key=_size)


def _changed(mine: dict[Place, int], theirs: dict[Place, int]) -> int:
    """Places on which the two don't agree; missing places count."""
    return sum(mine.get(place) != theirs.get(place) for place in mine.keys() | theirs.keys())
