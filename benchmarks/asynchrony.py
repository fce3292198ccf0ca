"""Synchronous, one batch ahead and asynchronous runs on the same work, beside what generation and training take alone.

OMP_NUM_THREADS=1 python benchmarks/asynchrony.py --out results/asynchrony.json

All runs have the same prompts, the same response lengths (drawn from a long tail, `rollout.response_length`) and the
same number of steps. The engine's processes run on one core, the trainer's on another; the driver, Ray and the graders
may run on both. Alone, in the same processes, generation and training do the same work one after the other: the larger
of the two times is what a run could not be faster than. At once, without a weight update and without waiting for one
another, tells what two cores that share caches, memory and a driver are worth here. What the simulation
(`megatron_vespo.planning`) predicts stands beside it; its rates are taken from the two alone, never from the runs that it
predicts.
"""

import argparse
import asyncio
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

import psutil
from rich.console import Console

from megatron_vespo.config import ResponseLengthConfig, TrainConfig, load_config
from megatron_vespo.data.prompt import Prompt
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
from megatron_vespo.rollout.trajectory import Group

CONFIG = "examples/quickstart.yaml"
TASK = "{type: reasoning_gym, task: chain_sum, settings: {min_terms: 30, max_terms: 34, min_digits: 1, max_digits: 1}}"
SETTINGS = (
    "data.max_prompt_tokens=128",
    f"data.sources=[{TASK}]",
    "rollout.group_size=8",
    "rollout.max_response_tokens=370",
    "rollout.response_length={median: 20, sigma: 1.0}",
    "rollout.deterministic=false",
    "rollout.concurrent_groups=32",
    "algorithm.prompts_per_step=8",
    # So that training takes about as long as generation: long prompts, two more forward passes, recomputation.
    "algorithm.old_policy=proximal",
    "algorithm.objective.kl.coefficient=0.001",
    "policy.reference={}",
    "policy.recompute.granularity=full",
    "policy.ranks=1",
    "policy.layout={}",
    "weight_sync.verify_every=1000",
    "checkpoint.save_every=0",
    "evaluation={prompts: 2}",
    "observability.tensorboard=false",
)
SYNC_EVERY = 8
BOUNDS = {"synchronous": None, "one batch ahead": 2 * SYNC_EVERY - 1, "asynchronous": 4 * SYNC_EVERY}
SHORT, LONG = 16, 144
"""Tokens of the responses whose difference tells the speed of decoding."""


@dataclass(frozen=True)
class Rates:
    """What was measured of generation alone and of training alone; the simulation knows nothing else.

    Attributes:
        decode: (running requests, seconds of a decode iteration).
        prefill_tokens_per_second: of the engine.
        token_seconds: of a step, for each of its tokens.
        sync_seconds: a weight update of an engine that does nothing.
    """

    decode: list[tuple[int, float]]
    prefill_tokens_per_second: float
    token_seconds: float
    sync_seconds: float


@dataclass
class Alone:
    """Generation and training of the same work, one after the other.

    Attributes:
        generation, training: seconds.
        at_once: seconds of both side by side, neither waiting for the other.
        cpu: of each, CPU seconds by role.
    """

    generation: float
    training: float
    at_once: float
    cpu: dict[str, dict[str, float]]
    prompts: list[Prompt]
    rates: Rates


def run_config(folder: Path, mode: str, steps: int, update: str, overrides: Sequence[str]) -> TrainConfig:
    bound = BOUNDS[mode]
    own = [
        f"run_dir={folder / mode.replace(' ', '_')}",
        f"algorithm.steps={steps}",
        f"algorithm.staleness={SYNC_EVERY}",
    ]
    if bound is not None:
        settings = f"sync_every: {SYNC_EVERY}, max_staleness: {bound}, mismatch_every: 10000, update: {update}"
        own += [
            f"algorithm.asynchronous={{{settings}}}",
            f"weight_sync.flush_cache={str(update != 'in_place').lower()}",
        ]
    return load_config(TrainConfig, CONFIG, [*SETTINGS, *own, *overrides])


def pin_processes() -> None:
    """The engine's processes to the first core, the trainer's to the second, threads and all."""
    generation, training, *_ = sorted(os.sched_getaffinity(0))
    for role, processes in processes_by_role().items():
        for process in processes if role in ("engine", "trainer") else ():
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {generation if role == "engine" else training})


def processes_by_role() -> dict[str, list[psutil.Process]]:
    """This one is the driver; "other" is Ray's own and the graders."""
    found = {"engine": [], "trainer": [], "driver": [psutil.Process()], "other": []}
    for child in psutil.Process().children(recursive=True):
        line = " ".join(child.cmdline())
        engine = "ray::EngineActor" in line or "sglang" in line or "megatron_vespo.rollout" in line
        found["engine" if engine else "trainer" if "ray::PolicyRank" in line else "other"].append(child)
    return found


def cpu_seconds() -> dict[str, float]:
    """That each role has used so far."""
    return {
        role: sum(sum(process.cpu_times()[:2]) for process in processes)
        for role, processes in processes_by_role().items()
    }


def used_since(before: dict[str, float]) -> dict[str, float]:
    return {role: round(seconds - before[role], 2) for role, seconds in cpu_seconds().items()}


async def generate_alone(session: Session, prompts: list[Prompt], run_seed: int | None = None, **changes) -> float:
    """Seconds of sampling and grading; `changes` of the rollout settings. The groups are kept in the session's progress,
    in the order of their prompts."""
    config, sampler = session.config, session.sampler
    version = session.engines.weight_version
    stream = generate_groups(
        sampler.fleet,
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
    """Seconds of a decode iteration by running requests, and prompt tokens a second, each prompt counted once."""
    rollout, (client,) = session.config.rollout, session.sampler.fleet.clients
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
        prefills.append(sum(len(p.token_ids) for p in prompts[:groups]) / max(before, 1e-3))
    return points, prefills[-1]


async def train_alone(
    session: Session, groups: list[Group], steps: int, update: bool = True
) -> tuple[float, int, list[float]]:
    """All steps on groups in order, with weight updates of an idle engine between if wanted, which are timed apart.

    Returns:
        Seconds without the updates; tokens; seconds of each update.
    """
    algorithm, progress = session.config.algorithm, session.progress
    training, tokens, updates = 0.0, 0, []
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
        tokens += sum(len(t.prompt.token_ids) + len(t.response_ids) for t in trajectories)
        training += time.monotonic() - started
        if update and progress.step % SYNC_EVERY == 0 and progress.step < steps:
            started = time.monotonic()
            await sync_weights(session)
            updates.append(time.monotonic() - started)
    return training, tokens, updates


def measure_alone(found: dict[str, Alone]) -> Loop:
    async def loop(session: Session) -> None:
        algorithm = session.config.algorithm
        await sync_weights(session)
        pin_processes()
        prompts = session.prompts.take(algorithm.steps * algorithm.prompts_per_step)
        await generate_alone(session, prompts[: 2 * session.config.rollout.concurrent_groups])  # warms up
        (client,) = session.sampler.fleet.clients
        await client.flush_cache()
        cpu, before = {}, cpu_seconds()
        generation = await generate_alone(session, prompts)
        cpu["generation"] = used_since(before)
        groups = [Group(prompt, step) for prompt, step in zip(prompts, session.progress.mini_batches, strict=True)]
        decode, prefill = await measure_decoding(session, prompts)
        session.progress.mini_batches = []
        await train_alone(session, groups[: 2 * algorithm.prompts_per_step], 2)  # warms up
        session.progress.step = 0
        before = cpu_seconds()
        training, tokens, updates = await train_alone(session, groups, algorithm.steps)
        cpu["training"] = used_since(before)
        session.progress.step = 0
        await client.flush_cache()
        before, started = cpu_seconds(), time.monotonic()
        await asyncio.gather(
            generate_alone(session, prompts), train_alone(session, groups, algorithm.steps, update=False)
        )
        at_once = time.monotonic() - started
        cpu["at once"] = used_since(before)
        session.progress.mini_batches = []
        rates = Rates(decode, prefill, training / tokens, statistics.median(updates))
        found["alone"] = Alone(generation, training, at_once, cpu, prompts, rates)

    return loop


async def run(parts: Parts, config: TrainConfig, loop: Loop) -> RunFolder:
    folder, name = create_run_folder(config, config.run_dir, True, 0), Path(config.run_dir).name
    with ExitStack() as stack:
        log = Console(file=stack.enter_context((folder / "console.log").open("w")), highlight=False)
        console = stack.enter_context(RunConsole(name, config.algorithm.steps, SYNC_EVERY, "plain", log))
        record = stack.enter_context(recorded(config, folder, console, time.monotonic()))
        await run_once(parts, config, prepare_training(config), record, console, loop)
    return read_run(config.run_dir)


def measured(config: TrainConfig, cpu: dict[str, float]) -> Loop:
    """The run's own loop, on pinned processes; `cpu` gets the CPU seconds by role."""

    async def loop(session: Session) -> None:
        pin_processes()
        before = cpu_seconds()
        await loop_of(config)(session)
        cpu.update(used_since(before))

    return loop


def seconds_of_loop(found: RunFolder) -> float:
    """From the end of the evaluation before training to the end of the last step."""
    (before,) = (row["timestamp"] for row in found.kind("evaluation") if row["when"] == "before")
    return max(row["timestamp"] for row in found.kind("step")) - before


def staleness_of(found: RunFolder) -> dict[int, int]:
    """Trajectories by age."""
    rows = map(json.loads, (found.path / "weights.jsonl").read_text().splitlines())
    return dict(sorted(Counter(int(age) for row in rows for age in row["age"]).items()))


def workload_of(config: TrainConfig, max_staleness: int | None, prompts: list[Prompt]) -> Workload:
    """What the simulation runs: the same prompts with the same lengths."""
    rollout, algorithm = config.rollout, config.algorithm
    lengths, limit = rollout.response_length, rollout.max_response_tokens
    assert lengths is not None

    def tokens(group: int, sample: int) -> int:
        return min(limit, drawn_length(lengths, config.seed, prompts[group].identity, sample))

    return Workload(
        steps=algorithm.steps,
        groups_per_step=algorithm.prompts_per_step,
        group_size=rollout.group_size,
        sync_every=SYNC_EVERY,
        max_staleness=max_staleness,
        concurrent_groups=rollout.concurrent_groups,
        prompt_tokens=round(statistics.mean(len(prompt.token_ids) for prompt in prompts)),
        response_tokens=tokens,
        update="abort" if algorithm.asynchronous is None else algorithm.asynchronous.update,
    )


def cluster_of(config: TrainConfig, alone: Alone) -> tuple[Cluster, float]:
    """The measured rates, and by what the engine's were multiplied.

    Decoding at fixed numbers of requests tells how the engine's speed changes with them; how fast it is while requests
    come and go, generation of the whole work alone tells.
    """
    rates, rollout = alone.rates, config.rollout

    def cluster(slower: float, token_seconds: float, sync_seconds: float) -> Cluster:
        decode = DecodeSpeed(tuple((running, slower * seconds) for running, seconds in rates.decode))
        running = rollout.concurrent_groups * rollout.group_size
        engine = EngineRates(decode, running, rates.prefill_tokens_per_second / slower)
        return Cluster(1, engine, TrainerRates(1 / token_seconds), sync_seconds)

    nobody_waits = replace(workload_of(config, 10**9, alone.prompts), sync_every=10**9)
    slower = alone.generation / simulate(cluster(1.0, 1e-12, 0.0), nobody_waits).seconds
    return cluster(slower, rates.token_seconds, rates.sync_seconds), slower


def predict(config: TrainConfig, mode: str, alone: Alone) -> dict:
    """Of the simulation."""
    cluster, slower = cluster_of(config, alone)
    outcome = simulate(cluster, workload_of(config, BOUNDS[mode], alone.prompts))
    return {
        "seconds": round(outcome.seconds, 1),
        "engine_rates_divided_by": round(slower, 3),
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
        "at_once_over_wall": round(alone.at_once / seconds, 3),
        "trainer_waited_seconds": round(sum(waited), 1) if waited else None,
        "training_seconds": round(sum(row["time/train"] for row in found.kind("step")), 1),
        "sync_seconds": round(sum(row["time/sync"] for row in found.kind("sync")), 1),
        "updates_mid_generation": found.summary.get("updates_mid_generation"),
        "staleness": staleness_of(found),
        "predicted": predicted,
        "predicted_over_measured": round(predicted["seconds"] / seconds, 3),
    }


async def measure(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Each round holds all that is compared, side by side in time: the machine is shared, and its speed changes."""
    rounds = []
    steps, update, overrides = options.steps, options.update, options.overrides
    warm_up = run_config(folder / "warm_up", "asynchronous", SYNC_EVERY, update, overrides)
    async with Runtime(warm_up.policy.ranks + 1, folder, LOOPBACK) as runtime:
        parts = Parts(runtime)
        await run(parts, warm_up, measured(warm_up, {}))
        for number in range(options.rounds):
            own = folder / f"round_{number}"
            configs = {mode: run_config(own, mode, steps, update, overrides) for mode in BOUNDS}
            rounds.append(await measure_round(parts, own, configs))
    return rounds


async def measure_round(parts: Parts, folder: Path, configs: dict[str, TrainConfig]) -> dict:
    found: dict[str, Alone] = {}
    alone_config = configs["synchronous"].model_copy(update={"run_dir": str(folder / "alone")})
    await run(parts, alone_config, measure_alone(found))
    alone = found["alone"]
    figures = {
        "generation_alone_seconds": round(alone.generation, 1),
        "training_alone_seconds": round(alone.training, 1),
        "at_once_seconds": round(alone.at_once, 1),
        "cpu_seconds": alone.cpu,
        "rates": asdict(alone.rates),
        "runs": {},
    }
    print(figures, flush=True)
    for mode, config in configs.items():
        cpu: dict[str, float] = {}
        found_run = await run(parts, config, measured(config, cpu))
        figures["runs"][mode] = figures_of(found_run, config, mode, alone) | {"cpu_seconds": cpu}
        print(mode, figures["runs"][mode], flush=True)
    return figures


def table(rounds: list[dict]) -> str:
    """The median of the rounds, and their range."""

    def spread(values: list[float], digits: int = 2) -> str:
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    names = {"generation alone": "generation_alone_seconds", "training alone": "training_alone_seconds"}
    names["at once"] = "at_once_seconds"
    lines = [f"{name}: {spread([found[key] for found in rounds], 1)} s" for name, key in names.items()]
    columns = {
        "wall s": ("seconds", 1),
        "ideal / wall": ("ideal_over_wall", 2),
        "at once / wall": ("at_once_over_wall", 2),
        "predicted / measured": ("predicted_over_measured", 2),
    }
    lines += ["", " | ".join(["run             | S ", *(f"{name:22}" for name in columns), "mean staleness"])]
    for mode in BOUNDS:
        runs = [found["runs"][mode] for found in rounds]
        cells = [f"{spread([run[key] for run in runs], digits):22}" for key, digits in columns.values()]
        ages = Counter()
        for entry in runs:
            ages.update(entry["staleness"])
        mean = sum(age * count for age, count in ages.items()) / ages.total()
        lines.append(" | ".join([f"{mode:15}", f"{runs[0]['max_staleness']:2d}", *cells, f"{mean:.1f}"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64, help=f"a multiple of {SYNC_EVERY}")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--update", choices=("abort", "in_place", "wait"), default="abort")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("overrides", nargs="*", help="settings of all runs, as key.path=value")
    options = parser.parse_args()
    if options.steps % SYNC_EVERY or options.steps < 2 * SYNC_EVERY:
        parser.error(f"--steps {options.steps}: a multiple of {SYNC_EVERY}, at least {2 * SYNC_EVERY}")
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
        "update": options.update,
    }
    with tempfile.TemporaryDirectory() as folder:
        rounds = run_interruptible(lambda: measure(Path(folder), options))
    print(table(rounds))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about | {"rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
