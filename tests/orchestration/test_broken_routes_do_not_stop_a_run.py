"""One real run of R3: what it measures, broken routes at its start, and broken routes in the middle of it.

The server is real; what it answers is broken on the way, as no healthy server would.
"""

import base64
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_a_run_from_start_to_report import SHORT, rows

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.mini_batches import mini_batches
from megatron_vespo.orchestration.rollouts import collect_rollouts
from megatron_vespo.orchestration.routing_probe import ProbeFailed, probe_engine_routes
from megatron_vespo.orchestration.steps import sync_weights, train_step
from megatron_vespo.orchestration.training_run import Resume, run_training_loop
from megatron_vespo.rollout.trajectory_file import read_trajectories

pytestmark = pytest.mark.slow

LAYERS, TOPK, EXPERTS = 2, 2, 8
SETTINGS = (
    *SHORT,
    "routing.replay=R3",
    "algorithm.old_policy=proximal",
    "checkpoint.save_every=0",
    "algorithm.steps=8",
    "observability.tensorboard=false",
)


def changed(payload: str, kind: str) -> str | None:
    ids = np.frombuffer(base64.b64decode(payload), dtype="<i4").reshape(-1, LAYERS, TOPK).copy()
    match kind:
        case "missing":
            return None
        case "truncated":
            return payload[: len(payload) // 2]
        case "layers":
            ids = np.concatenate([ids, ids], axis=1)
        case "range":
            ids[0, 1, 0] = EXPERTS
        case "duplicates":
            ids[-1, 0] = ids[-1, 0, 0]
        case "zero_layer":
            ids[:, 1] = 0
        case "shifted":
            ids = np.roll(ids, 1, axis=0)
        case "layers swapped":
            ids = ids[:, ::-1]
    return base64.b64encode(np.ascontiguousarray(ids).tobytes()).decode()


KINDS = ("missing", "truncated", "layers", "range", "duplicates", "zero_layer")


class Broken:
    """Takes the place of `client.generate`; every response gets the next of `kinds`, in turn. "": left alone."""

    def __init__(self, client, *kinds: str):
        self.client, self.kinds = client, kinds

    def __enter__(self):
        asked = self.client.generate
        responses = 0

        async def generate(*arguments, **options):
            nonlocal responses
            outputs = await asked(*arguments, **options)
            for place, output in enumerate(outputs):
                kind = self.kinds[responses % len(self.kinds)]
                responses += 1
                if kind:
                    outputs[place] = replace(output, routed_experts=changed(output.routed_experts, kind))
            return outputs

        self.client.generate = generate

    def __exit__(self, *_):
        del self.client.generate


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, str], list]:
    """The run's folder, what the probe said of each kind, the batch in which half of the routes were broken."""
    folder = tmp_path_factory.mktemp("runs") / "replayed"
    config = load_config(TrainConfig, "examples/quickstart.yaml", [f"run_dir={folder}", *SETTINGS])
    said: dict[str, str] = {}
    batch = []

    async def loop(session) -> None:
        await sync_weights(session)  # probes as well
        (client,) = session.sampler.fleet.clients
        for kind in (*KINDS, "shifted", "layers swapped"):
            with Broken(client, kind), pytest.raises(ProbeFailed) as failure:
                await probe_engine_routes(session)
            said[kind] = str(failure.value)
        for broken in (("",), ("", "", *KINDS)):
            await sync_weights(session)
            with Broken(client, *broken):
                groups = await collect_rollouts(session, session.progress.step // 4, session.progress.step)
            session.progress.mini_batches = list(mini_batches(groups, config.algorithm.prompts_per_step))
            while session.progress.mini_batches:
                await train_step(session, session.progress.mini_batches.pop(0))
        batch.extend(t for group in groups for t in group.trajectories)

    with RunConsole("test", 8, 4, "plain") as console:
        run_training_loop(config, console, loop, Resume())
    return folder, said, batch


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_at_the_start_stops_the_run_with_the_reason(run, kind):
    assert kind in run[1][kind] and "routing.replay: off" in run[1][kind]


@pytest.mark.parametrize("kind", ["shifted", "layers swapped"])
def test_the_probe_finds_rows_and_layers_in_the_wrong_place(run, kind):
    assert "choose the same experts at" in run[1][kind] and "expected at least 99%" in run[1][kind]


def test_a_whole_batch_is_recorded_and_agrees_before_its_first_step(run):
    first, second = rows(run[0], "rollout")
    assert first["routing/missing_share"] == 0
    assert not any(name.startswith("routing/masked") for name in first)
    assert first["routing/bytes_per_token_stored"] == LAYERS * TOPK
    assert first["routing/bytes_per_token_wire"] == pytest.approx(4 / 3 * 4 * LAYERS * TOPK, rel=0.01)
    for row in (first, second):
        assert row["routing_probe/same_set"] == 1
        assert 0 <= row["routing_probe/replayed/k3"] < 1e-10
        assert 0 <= row["routing_probe/native/k3"] < 1e-10
    steps = rows(run[0], "step")
    for row in (steps[0], steps[4]):  # the engine's weights
        assert row["routing/same_set"] == 1
        assert row["mismatch/mean_abs"] < 1e-5
        assert row["log_weight/std"] < 1e-5
    assert 0.5 < steps[3]["routing/same_set"] < 1 and steps[3]["routing/margin"] > 0
    assert all(row["routing/bytes_per_token_sent"] >= LAYERS * TOPK for row in steps)


def test_broken_routes_are_masked_and_counted_by_kind_and_the_run_goes_on(run):
    folder, _, batch = run
    second = rows(folder, "rollout")[1]
    masked = Counter()
    for trajectory in batch:
        assert bool(trajectory.engine_routes.recorded.all()) == (not trajectory.engine_routes.masked)
        masked.update(trajectory.engine_routes.masked)
    positions = sum(len(t.prompt.token_ids) + len(t.response_ids) - 1 for t in batch)
    counted = {
        name.removeprefix("routing/masked/"): n for name, n in second.items() if name.startswith("routing/masked")
    }
    assert set(counted) == set(KINDS) and counted == masked
    assert second["routing/missing_share"] == pytest.approx(sum(masked.values()) / positions)
    steps = rows(folder, "step")
    assert len(steps) == 8 and all(0.4 < row["routing/missing_share"] < 1 for row in steps[4:])
    assert all(np.isfinite(row["loss"]) for row in steps)


def test_the_probed_trajectories_are_kept_with_both_routes(run):
    kept = read_trajectories(run[0] / "routing")
    assert len(kept) == 8
    for trajectory in kept:
        engine, trainer = trajectory.engine_routes, trajectory.proximal_routes
        assert trainer.recorded.all()
        same = np.sort(engine.experts, -1) == np.sort(trainer.experts, -1)
        assert same[engine.recorded].all()
