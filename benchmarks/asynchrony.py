"""Synchronous, one batch ahead and asynchronous runs on the same work, beside what generation and training take alone.

OMP_NUM_THREADS=1 python benchmarks/asynchrony.py --out results/asynchrony.json

All runs have the same prompts, the same response lengths (drawn from a long tail, `rollout.response_length`) and the
same number of steps. The engine's processes run on one core, the trainer's on another; the driver, Ray and the graders
may run on both. Alone, in the same processes, generation and training do the same work one after the other: the larger
of the two times is what a run could not be faster than. What the simulation (`megatron_vespo.planning`) predicts stands
beside it; its rates are taken from these two alone, never from the runs that it predicts.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from megatron_vespo.config import ResponseLengthConfig, TrainConfig, load_config
from megatron_vespo.interface import LOOPBACK
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.run_folder import RunFolder, read_run
from megatron_vespo.orchestration.interruption import run_interruptible
from megatron_vespo.orchestration.mini_batches import assign_advantages, shape_rewards
from megatron_vespo.orchestration.parts import Parts
from megatron_vespo.orchestration.preflight import prepare_training
from megatron_vespo.orchestration.rescoring import rescore
from megatron_vespo.orchestration.run_folder import create_run_folder
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.steps import sync_weights, train_step
from megatron_vespo.orchestration.training import loop_of
from megatron_vespo.orchestration.training_run import Loop, recorded, run_once
from megatron_vespo.planning.rates import Cluster, DecodeSpeed, EngineRates, TrainerRates
from megatron_vespo.planning.simulation import simulate
from megatron_vespo.planning.workload import Workload
from megatron_vespo.rollout.generate import generate_groups
from megatron_vespo.rollout.response_lengths import drawn_length
from megatron_vespo.rollout.trajectory import Group, Prompt

CONFIG = "examples/quickstart.yaml"
SETTINGS = (
    "rollout.group_size=8",
    "rollout.max_response_tokens=400",
    "rollout.response_length={median: 40, sigma: 1.0}",
    "rollout.deterministic=false",
    "rollout.concurrent_groups=12",
    "algorithm.prompts_per_step=8",
    "algorithm.old_policy=proximal",
    "policy.ranks=1",
    "policy.layout={}",
    "weight_sync.verify_every=1000",
    "checkpoint.save_every=0",
    "evaluation={prompts: 2}",
    "observability.tensorboard=false",
)
SYNC_EVERY = 4
BOUNDS = {"synchronous": None, "one batch ahead": 2 * SYNC_EVERY - 1, "asynchronous": 4 * SYNC_EVERY}
SHORT, LONG = 16, 144
"""Tokens of the responses whose difference tells the speed of decoding."""


@dataclass(frozen=True)
class Rates:
    """What was measured of generation alone and of training alone; the simulation knows nothing else.

    Attributes:
        decode: (running requests, seconds of a decode iteration).
        prefill_tokens_per_second: of the engine.
        step_seconds, token_seconds: a step takes the one and, for each token, the other.
        sync_seconds: a weight update of an engine that does nothing.
    """

    decode: list[tuple[int, float]]
    prefill_tokens_per_second: float
    step_seconds: float
    token_seconds: float
    sync_seconds: float


@dataclass
class Alone:
    """Generation and training of the same work, one after the other.

    Attributes:
        generation, training: seconds.
        prompt_tokens: of each group.
    """

    generation: float
    training: float
    prompts: list[Prompt]
    rates: Rates


def run_config(folder: Path, mode: str, steps: int, overrides: Sequence[str]) -> TrainConfig:
    bound = BOUNDS[mode]
    loop = f"algorithm.staleness={SYNC_EVERY}"
    if bound is not None:
        loop = f"algorithm.asynchronous={{sync_every: {SYNC_EVERY}, max_staleness: {bound}, mismatch_every: 10000}}"
    own = (f"run_dir={folder / mode.replace(' ', '_')}", f"algorithm.steps={steps}", loop)
    return load_config(TrainConfig, CONFIG, [*SETTINGS, *own, *overrides])


def pin_processes() -> dict[str, int | None]:
    """The engine's processes to the first core, the trainer's to the second, threads and all. Gives processes by role."""
    generation, training, *_ = sorted(os.sched_getaffinity(0))
    children = psutil.Process().children(recursive=True)
    roles = {child.pid: role_of(child) for child in children}
    for child in children:
        if child.ppid() in roles and roles[child.ppid()] == "engine":  # the server of the engine's actor, and below
            roles[child.pid] = "engine"
    for pid, role in roles.items():
        if role in ("engine", "trainer"):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {generation if role == "engine" else training})
    return dict(Counter(roles.values()))


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if "ray::EngineActor" in line or "sglang" in line or "megatron_vespo.rollout" in line:
        return "engine"
    return "trainer" if "ray::PolicyRank" in line else "other"


async def generate_alone(session: Session, prompts: list[Prompt], run_seed: int | None = None, **changes) -> float:
    """Seconds of sampling and grading; `changes` of the rollout settings. The groups are kept in the session's progress,
    in the order of their prompts."""
    config, sampler = session.config, session.sampler
    version = session.weights.weight_version
    stream = generate_groups(
        sampler.client,
        prompts,
        config.rollout.model_copy(update=changes),
        stop_token_ids=sampler.tokenizer.stop_token_ids,
        vocab_size=sampler.vocab_size,
        run_seed=config.seed if run_seed is None else run_seed,
        batch_index=0,
        weight_version=version,
        cache_version=session.weights.cache_version,
        routes=None,
    )
    started = time.monotonic()
    groups, _, _ = await sampler.collect(stream, prompts)
    session.progress.mini_batches = [group.trajectories for group in groups]
    return time.monotonic() - started


async def measure_decoding(session: Session, prompts: list[Prompt]) -> tuple[list[tuple[int, float]], float]:
    """Seconds of a decode iteration by running requests, and prompt tokens a second."""
    rollout, client = session.config.rollout, session.sampler.client
    largest = rollout.concurrent_groups
    points, prefills = [], []
    for groups, samples in ((1, 2), (1, 8), (max(1, largest // 3), 8), (largest, 8)):
        seconds = {SHORT: [], LONG: []}
        for _ in range(2):
            for tokens in (SHORT, LONG):
                await client.flush_cache()
                lengths = ResponseLengthConfig(median=tokens, sigma=0)
                taken = await generate_alone(session, prompts[:groups], group_size=samples, response_length=lengths)
                seconds[tokens].append(taken)
        per_iteration = (min(seconds[LONG]) - min(seconds[SHORT])) / (LONG - SHORT)
        points.append((groups * samples, per_iteration))
        before = min(seconds[SHORT]) - SHORT * per_iteration
        prefills.append(sum(len(p.token_ids) for p in prompts[:groups]) * samples / max(before, 1e-3))
    return points, prefills[-1]


async def train_alone(session: Session, groups: list[Group], steps: int) -> tuple[float, list, list[float]]:
    """All steps on groups in order, with weight updates of an idle engine between, which are timed apart.

    Returns:
        Seconds without the updates; (tokens, seconds) of each step; seconds of each update.
    """
    algorithm, progress = session.config.algorithm, session.progress
    done, updates = [], []
    for step in range(steps):
        started = time.monotonic()
        chosen = groups[step * algorithm.prompts_per_step :][: algorithm.prompts_per_step]
        trajectories = [t for group in chosen for t in group.trajectories]
        for t in trajectories:
            t.segments = [replace(segment, weight_version=progress.step) for segment in t.segments]
        await rescore(session, chosen)
        shape_rewards(chosen, algorithm, session.config.rollout.max_response_tokens)
        assign_advantages(chosen, algorithm.advantage)
        await train_step(session, trajectories)
        tokens = sum(len(t.prompt.token_ids) + len(t.response_ids) for t in trajectories)
        done.append((tokens, time.monotonic() - started))
        if progress.step % SYNC_EVERY == 0 and progress.step < steps:
            started = time.monotonic()
            await sync_weights(session)
            updates.append(time.monotonic() - started)
    return sum(seconds for _, seconds in done), done, updates


def measure_alone(found: dict[str, Alone]) -> Loop:
    async def loop(session: Session) -> None:
        algorithm = session.config.algorithm
        await sync_weights(session)
        pin_processes()
        prompts = session.prompts.take(algorithm.steps * algorithm.prompts_per_step)
        await generate_alone(session, prompts[: 2 * session.config.rollout.concurrent_groups])  # warms up
        await session.sampler.client.flush_cache()
        generation = await generate_alone(session, prompts)
        groups = [Group(prompt, step) for prompt, step in zip(prompts, session.progress.mini_batches, strict=True)]
        decode, prefill = await measure_decoding(session, prompts)
        session.progress.mini_batches = []
        await train_alone(session, groups[: 2 * algorithm.prompts_per_step], 2)  # warms up
        session.progress.step = 0
        training, steps, updates = await train_alone(session, groups, algorithm.steps)
        token_seconds, step_seconds = np.polyfit([t for t, _ in steps], [s for _, s in steps], 1)
        rates = Rates(decode, prefill, float(step_seconds), float(token_seconds), statistics.median(updates))
        found["alone"] = Alone(generation, training, prompts, rates)

    return loop


async def run(parts: Parts, config: TrainConfig, loop: Loop | None) -> RunFolder:
    folder, name = create_run_folder(config, config.run_dir, True, 0), Path(config.run_dir).name
    with ExitStack() as stack:
        log = Console(file=stack.enter_context((folder / "console.log").open("w")), highlight=False)
        console = stack.enter_context(RunConsole(name, config.algorithm.steps, SYNC_EVERY, "plain", log))
        record = stack.enter_context(recorded(config, folder, console, time.monotonic()))
        await run_once(parts, config, prepare_training(config), record, console, loop or pinned(loop_of(config)))
    return read_run(config.run_dir)


def pinned(loop: Loop) -> Loop:
    async def pin_and_run(session: Session) -> None:
        pin_processes()
        await loop(session)

    return pin_and_run


def seconds_of_loop(found: RunFolder) -> float:
    """From the end of the evaluation before training to the end of the last step."""
    (before,) = (row["timestamp"] for row in found.kind("evaluation") if row["when"] == "before")
    return max(row["timestamp"] for row in found.kind("step")) - before


def staleness_of(found: RunFolder) -> dict[int, int]:
    """Trajectories by age."""
    rows = map(json.loads, (found.path / "weights.jsonl").read_text().splitlines())
    return dict(sorted(Counter(int(age) for row in rows for age in row["age"]).items()))


def predict(config: TrainConfig, mode: str, alone: Alone) -> dict:
    """Of the simulation."""
    rates, rollout, algorithm = alone.rates, config.rollout, config.algorithm
    lengths, limit = rollout.response_length, rollout.max_response_tokens
    assert lengths is not None
    engine = EngineRates(
        DecodeSpeed(tuple(rates.decode)),
        max_running=rollout.concurrent_groups * rollout.group_size,
        prefill_tokens_per_second=rates.prefill_tokens_per_second,
        prefix_cache=False,
    )
    trainer = TrainerRates(1 / rates.token_seconds, rates.step_seconds)
    workload = Workload(
        steps=algorithm.steps,
        groups_per_step=algorithm.prompts_per_step,
        group_size=rollout.group_size,
        sync_every=SYNC_EVERY,
        max_staleness=BOUNDS[mode],
        concurrent_groups=rollout.concurrent_groups,
        prompt_tokens=round(statistics.mean(len(prompt.token_ids) for prompt in alone.prompts)),
        response_tokens=lambda group, sample: min(
            limit, drawn_length(lengths, config.seed, alone.prompts[group].identity, sample)
        ),
    )
    outcome = simulate(Cluster(1, engine, trainer, rates.sync_seconds), workload)
    return {
        "seconds": round(outcome.seconds, 1),
        "staleness": dict(sorted(outcome.staleness.items())),
        "updates_mid_generation": outcome.updates_mid_generation,
    }


def figures_of(found: RunFolder, config: TrainConfig, mode: str, alone: Alone) -> dict:
    seconds, predicted = seconds_of_loop(found), predict(config, mode, alone)
    waited = [row["time/wait"] for row in found.kind("rollout") if "time/wait" in row]
    return {
        "max_staleness": BOUNDS[mode] if BOUNDS[mode] is not None else SYNC_EVERY - 1,
        "seconds": round(seconds, 1),
        "ideal_over_wall": round(max(alone.generation, alone.training) / seconds, 3),
        "trainer_waited_seconds": round(sum(waited), 1) if waited else None,
        "training_seconds": round(sum(row["time/train"] for row in found.kind("step")), 1),
        "sync_seconds": round(sum(row["time/sync"] for row in found.kind("sync")), 1),
        "updates_mid_generation": found.summary.get("updates_mid_generation"),
        "staleness": staleness_of(found),
        "predicted": predicted,
        "predicted_over_measured": round(predicted["seconds"] / seconds, 3),
    }


async def measure(folder: Path, steps: int, overrides: Sequence[str]) -> dict:
    configs = {mode: run_config(folder, mode, steps, overrides) for mode in BOUNDS}
    warm_up = run_config(folder / "warm_up", "asynchronous", 2 * SYNC_EVERY, overrides)
    first = configs["synchronous"].model_copy(update={"run_dir": str(folder / "alone")})
    found: dict[str, Alone] = {}
    async with Runtime(first.policy.ranks + 1, folder, LOOPBACK) as runtime:
        parts = Parts(runtime)
        await run(parts, warm_up, None)
        await run(parts, first, measure_alone(found))
        alone = found["alone"]
        print(f"alone: generation {alone.generation:.1f} s, training {alone.training:.1f} s, {alone.rates}", flush=True)
        runs = {}
        for mode, config in configs.items():
            runs[mode] = figures_of(await run(parts, config, None), config, mode, alone)
            print(mode, runs[mode], flush=True)
        processes = pin_processes()
    return {
        "processes": processes,
        "generation_alone_seconds": round(alone.generation, 1),
        "training_alone_seconds": round(alone.training, 1),
        "rates": asdict(alone.rates),
        "runs": runs,
    }


def table(figures: dict) -> str:
    lines = ["run             | S  | wall s | ideal / wall | predicted s | predicted / measured | staleness, mean"]
    for mode, entry in figures["runs"].items():
        ages = entry["staleness"]
        mean = sum(age * count for age, count in ages.items()) / sum(ages.values())
        lines.append(
            f"{mode:15} | {entry['max_staleness']:2d} | {entry['seconds']:6.1f} | {entry['ideal_over_wall']:12.2f} | "
            f"{entry['predicted']['seconds']:11.1f} | {entry['predicted_over_measured']:20.2f} | {mean:.1f}"
        )
    alone = f"generation {figures['generation_alone_seconds']} s, training {figures['training_alone_seconds']} s"
    return "\n".join([f"alone: {alone}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help=f"a multiple of {SYNC_EVERY}")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("overrides", nargs="*", help="settings of all runs, as key.path=value")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("needs two cores")
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("sglang", "torch", "megatron-core")},
        "settings": [*SETTINGS, *options.overrides],
        "steps": options.steps,
        "sync_every": SYNC_EVERY,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures = about
        run_interruptible(lambda: measure_into(figures, Path(folder), options.steps, options.overrides))
    print(table(figures))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


async def measure_into(figures: dict, folder: Path, steps: int, overrides: Sequence[str]) -> None:
    figures |= await measure(folder, steps, overrides)


if __name__ == "__main__":
    main()
