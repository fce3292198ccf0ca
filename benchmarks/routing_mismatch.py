"""What replay repairs: engine and trainer with the same weights, and an engine that routes or computes otherwise.

    python benchmarks/routing_mismatch.py --json results/routing_mismatch.json

Each row is a real server of one model: in float32, with noise of several sizes on its choice of experts alone
(`rollout.engine.router_noise`, on: selection), with noise on its gate weights too (on: logits), and in bfloat16. Its
responses are scored by the trainer in float32, routing by itself and replaying the engine's routes.
"""

import argparse
import asyncio
import json
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.config import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RouterNoiseConfig,
    TrainConfig,
)
from megatron_vespo.config.load import load_config
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.objective.diagnostics import difference_diagnostics
from megatron_vespo.objective.metrics import measured_difference
from megatron_vespo.orchestration.mini_batches import training_sequences
from megatron_vespo.orchestration.routing_probe import agreeing_share
from megatron_vespo.packing.batch import MicroBatch, pack
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.rendezvous import listen
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generate import generate
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.server import EngineServer
from megatron_vespo.rollout.trajectory import Trajectory
from megatron_vespo.routing.routes import Routes
from megatron_vespo.routing.slices import RouteSlice, StepRoutes, assemble_routes, slice_routes

CONFIG = "examples/quickstart.yaml"
SCALES = (0.025, 0.05, 0.1, 0.3)
"""Of the noise, in logits."""
PROMPTS, SAMPLES, SEQUENCES_AT_ONCE = 32, 8, 64


@dataclass(frozen=True)
class Kind:
    name: str
    noise: RouterNoiseConfig | None = None
    dtype: str = "float32"


KINDS = (
    Kind("float32"),
    *(Kind(f"selection {scale}", RouterNoiseConfig(scale=scale)) for scale in SCALES),
    *(Kind(f"logits {scale}", RouterNoiseConfig(scale=scale, on="logits")) for scale in SCALES),
    Kind("bfloat16", dtype="bfloat16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="of a training run: model and tasks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_config(TrainConfig, arguments.config)
    trainer = Trainer(config)
    rows = []
    print(
        f"{'engine':16} {'other experts':>13} {'k3 native':>10} {'replayed':>10} {'ratio':>7}   > ln 2: native, replayed"
    )
    for kind in KINDS:
        rows.append({"engine": kind.name, **trainer.judge(sampled(config, kind))})
        print(line_of(rows[-1]), flush=True)
    if arguments.json:
        document = {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "model": config.model.path}
        arguments.json.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")


def line_of(row: dict) -> str:
    native, replayed = row["native/k3"], row["replayed/k3"]
    return (
        f"{row['engine']:16} {row['other_experts']:13.2%} {native:10.2e} {replayed:10.2e} {native / replayed:7.1f}   "
        f"{row['native/share_above_ln2']:.2%}, {row['replayed/share_above_ln2']:.2%}"
    )


def sampled(config: TrainConfig, kind: Kind) -> list[Trajectory]:
    """Responses of an engine of that kind, with the routes that it chose."""
    architecture, tokenizer = read_architecture(config.model.path), load_tokenizer(config.model.path)
    prompts = PromptStream(config.data, tokenizer, seed=config.seed).take(PROMPTS)
    generation = Generation(
        samples=SAMPLES,
        sampling=config.rollout.sampling,
        max_response_tokens=config.rollout.max_response_tokens,
        deterministic=kind.dtype == "float32",
        concurrent_groups=PROMPTS,
        stop_token_ids=tuple(tokenizer.stop_token_ids),
        vocab_size=architecture.vocab_size,
        run_seed=config.seed,
        stream="mismatch",
        weight_version=0,
        routes=architecture.routing_shape,
    )
    engine = EngineConfig(dtype=kind.dtype, router_noise=kind.noise, max_total_tokens=131072)  # type: ignore[arg-type]

    async def ask(server: EngineServer) -> list[Trajectory]:
        async with EngineClient(server.url, token=server.token) as client:
            groups = [group async for group in generate(Fleet([client]), prompts, generation)]
        return [trajectory for group in groups for trajectory in group.trajectories]

    with tempfile.TemporaryDirectory() as logs:
        server = EngineServer(
            config.model.path,
            config.model.dtype,
            engine,
            deterministic=generation.deterministic,
            seed=config.seed,
            log_path=Path(logs) / "engine.log",
            max_sequence_tokens=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            return_routed_experts=True,
        )
        server.start()
        try:
            return asyncio.run(ask(server))
        finally:
            server.stop()


class Trainer:
    """One rank in float32, with the weights that the engines serve."""

    def __init__(self, config: TrainConfig):
        self._architecture = read_architecture(config.model.path)
        self._policy = MegatronPolicy(
            self._architecture,
            ModelConfig(path=config.model.path, dtype="float32"),
            PolicyConfig(),
            OptimizerConfig(),
            total_steps=1,
            seed=0,
            rank=0,
            world_size=1,
            master=listen("127.0.0.1"),
            temperature=config.rollout.sampling.temperature,
        )
        load_hf_weights(self._policy.model, self._architecture, config.model.path)

    def judge(self, trajectories: list[Trajectory]) -> dict[str, float]:
        sequences = training_sequences(trajectories, "behavior")
        starts = range(0, len(sequences), SEQUENCES_AT_ONCE)
        batches = [pack(sequences[start : start + SEQUENCES_AT_ONCE]) for start in starts]
        engine = [t.engine_routes for t in trajectories if t.engine_routes is not None]
        shape = self._architecture.routing_shape
        routes = StepRoutes(slice_routes(batches, dict(enumerate(engine)), self._policy.place, shape))
        native, own = self._policy.score_and_record(batches)
        replayed, used = self._policy.score_and_record(batches, routes=routes)
        return {
            "tokens": sum(len(t.response_ids) for t in trajectories),
            "missing": 1 - sum(int(one.recorded.sum()) for one in engine) / sum(map(len, engine)),
            "other_experts": 1 - agreeing_share(engine, self._whole(batches, own)),
            "same_experts_replayed": agreeing_share(engine, self._whole(batches, used)),
            **difference(trajectories, native, "native"),
            **difference(trajectories, replayed, "replayed"),
        }

    def _whole(self, batches: list[MicroBatch], slices: list[RouteSlice]) -> list[Routes]:
        routes = assemble_routes([batches], [(self._policy.place, slices)], self._architecture.routing_shape, 0)
        return [routes[key] for key in sorted(routes)]


def difference(trajectories: list[Trajectory], scores: dict, prefix: str) -> dict[str, float]:
    trainer = torch.cat([scores[key].log_probs[len(t.prompt.token_ids) - 1 :] for key, t in enumerate(trajectories)])
    engine = torch.from_numpy(np.concatenate([t.behavior_log_probs for t in trajectories]))
    sums = measured_difference(trainer, engine, torch.ones(len(trainer), dtype=torch.bool))
    return difference_diagnostics({name: float(value) for name, value in sums.items()}, prefix)


if __name__ == "__main__":
    main()
