"""What a rank of a pool is asked to do with recorded routes."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import policy_reference
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from policy_jobs import Setup, joined, logits, per_token, said, whole_gradients
from torch import Tensor

from megatron_vespo.config import ModelConfig, PolicyConfig, RecomputeConfig
from megatron_vespo.packing.batch import MicroBatch
from megatron_vespo.policy.model import build_model
from megatron_vespo.policy.result import StepResult
from megatron_vespo.routing.replay import ReplayRouter
from megatron_vespo.routing.slices import RouteSlice, StepRoutes


def setup(architecture, model, recompute: str = "none") -> Setup:
    """Of one rank, with the weights of a transformers model."""
    settings = {
        "none": RecomputeConfig(),
        "moe": RecomputeConfig(granularity="selective", modules=("moe",)),
        "full": RecomputeConfig(granularity="full"),
    }
    weights = policy_reference.rank_weights(model, architecture, 1, 1)
    return Setup(architecture, weights, recompute=settings[recompute])


@dataclass
class Trained:
    result: StepResult
    gradients: dict[str, Tensor]


def train(
    rank: int, world_size: int, port: int, setup: Setup, batches: list[MicroBatch], routes: list[RouteSlice]
) -> Trained:
    with joined(rank, world_size, port, setup) as policy:
        result = policy.train_step(batches, per_token, routes=StepRoutes(routes, measure=True))
        return Trained(result, whole_gradients(policy))


@dataclass
class Recorded:
    recorded: list[RouteSlice]
    native: dict[int, Tensor]
    replayed: dict[int, Tensor]


def record(rank: int, world_size: int, port: int, setup: Setup, batches: list[MicroBatch]) -> Recorded:
    with joined(rank, world_size, port, setup) as policy:
        scores, recorded = policy.score_and_record(batches)
        again = policy.score(batches, routes=StepRoutes(recorded))
        return Recorded(
            recorded, {k: s.log_probs for k, s in scores.items()}, {k: s.log_probs for k, s in again.items()}
        )


def tokens_of_experts(rank: int, world_size: int, port: int, setup: Setup, batches: list[MicroBatch]):
    """[micro-batch][layer] tokens that all experts got together."""
    with joined(rank, world_size, port, setup) as policy:
        counts: list[int] = []
        layers = [m for m in policy.model[0].modules() if isinstance(m, MoELayer)]
        hooks = [m.experts.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0]))) for m in layers]
        policy.score(batches)
        for hook in hooks:
            hook.remove()
        return [counts[start : start + len(layers)] for start in range(0, len(counts), len(layers))]


def misuses(
    rank: int, world_size: int, port: int, setup: Setup, batches: list[MicroBatch], routes: list[RouteSlice]
) -> dict[str, str]:
    """What is said of each."""
    with joined(rank, world_size, port, setup) as policy:

        def step(given: list[RouteSlice]) -> str:
            return said(lambda: policy.score(batches, routes=StepRoutes(given)))

        short = replace(routes[1], experts=routes[1].experts[:-1], recorded=routes[1].recorded[:-1])
        found = {"a row too few": step([routes[0], short, routes[2]])}
        routers = [module for module in policy.model[0].modules() if isinstance(module, ReplayRouter)]
        calls = []

        def silent(scores, topk, *rest):
            calls.append(1)
            own = routers[1].router_replay.__class__.get_replay_topk
            return own(routers[1].router_replay, scores, topk, *rest) if len(calls) < 3 else rest[2](scores, topk)

        routers[1].router_replay.get_replay_topk = silent
        found["a router that is not asked"] = step(routes)
        del routers[1].router_replay.get_replay_topk
        twice = routers[0].register_forward_pre_hook(lambda router, inputs: (router.forward(*inputs), inputs)[1])
        found["a router that is asked twice"] = step(routes)
        twice.remove()
        found["afterwards"] = step(routes)
        return found


@dataclass
class Beside:
    """Logits of a second model, alone and while the first one replays; log-probs of the first, alone and with it."""

    other: tuple[Tensor, Tensor]
    replayed: tuple[Tensor, Tensor]


def beside_another_model(
    rank: int, world_size: int, port: int, setup: Setup, batches: list[MicroBatch], routes: list[RouteSlice]
) -> Beside:
    with joined(rank, world_size, port, setup) as policy:
        other = build_model(setup.architecture, ModelConfig(path="unused"), PolicyConfig(), policy.device, 1.0)
        second = SimpleNamespace(model=other)

        def replay() -> Tensor:
            scores = policy.score(batches, routes=StepRoutes(routes))
            return torch.cat([scores[key].log_probs for key in sorted(scores)])

        alone = logits(second, batches[0])
        first = replay()
        meanwhile = []
        hook = policy.model[0].register_forward_pre_hook(lambda *_: meanwhile.append(logits(second, batches[0])))
        beside = replay()
        hook.remove()
        return Beside((alone, meanwhile[1]), (first, beside))
