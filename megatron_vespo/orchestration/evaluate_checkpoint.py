"""`megatron-vespo eval`: accuracy of a checkpoint, on the engine alone."""

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.config import EvaluateConfig
from megatron_vespo.data.prompts import held_out_prompts
from megatron_vespo.data.sources import numbered_sources
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.cluster import gpus_per_process, interface_of
from megatron_vespo.orchestration.engine import engine_settings
from megatron_vespo.orchestration.engines import Engines
from megatron_vespo.orchestration.evaluation import describe_evaluation, sample_held_out
from megatron_vespo.orchestration.interruption import run_interruptible
from megatron_vespo.orchestration.preflight import check_engine
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.orchestration.supervision import RunFailed, all_of
from megatron_vespo.rewards.pool import OUTCOMES, RewardPool
from megatron_vespo.rewards.scorers import build_environments, build_scorers


def run_evaluation(config: EvaluateConfig, checkpoint: Path, output: Path | None, console: RunConsole) -> str:
    """avg@k, pass@k and response length of `checkpoint`, to be printed; also written to `output` as JSON.

    Raises:
        ConfigError: before anything was started.
        RunError: the engine failed, or the command was stopped.
    """
    interface = interface_of(config.cluster)
    architecture = check_folder(checkpoint)
    check_engine(str(checkpoint), config.dtype, architecture, config.data, config.rollout)
    tokenizer = load_tokenizer(checkpoint)
    sources = numbered_sources(config.data, config.evaluation.sources)
    build_scorers(sources)
    build_environments(sources)
    prompts = held_out_prompts(config.evaluation, config.data, tokenizer)

    async def main() -> dict[str, Any]:
        console.phase("starting the engine")
        async with Runtime(config.rollout.engine.count, folder, interface, config.cluster) as runtime:
            settings = engine_settings(
                str(checkpoint), config.dtype, config.data, config.rollout, seed=0, logs=runtime.logs
            )
            engine = config.rollout.engine
            gpus = engine.tensor_parallel * gpus_per_process(engine.count * engine.tensor_parallel)
            places = runtime.place(0, engine.count, gpus)
            engines = Engines(runtime, settings, gpus, weights_timeout_seconds=None, places=places)
            grader = RewardPool(
                config.reward, config.data, config.evaluation.sources, runtime.logs / "graders.log", runtime.parts
            )
            runtime.on_stop("graders", lambda: asyncio.to_thread(grader.close))
            starting = all_of(engines.start(), asyncio.to_thread(grader.start))
            timeout = config.rollout.engine.startup_timeout_seconds
            await runtime.supervisor.wait("start engine and graders", starting, timeout, owner="engines, graders")
            sampler = Sampler(
                engines.fleet, grader, tokenizer, architecture.vocab_size, config.rollout, runtime.supervisor, console
            )
            console.phase("evaluating")
            groups, _ = await sample_held_out(sampler, prompts, config.evaluation, weight_version=0)
            return describe_evaluation(sampler, groups)

    folder = Path(tempfile.mkdtemp(prefix="mv-eval-"))
    keep = False
    try:
        figures = run_interruptible(main)
    except RunFailed:
        keep = True  # its logs and stacks are there
        raise
    finally:
        if not keep:
            shutil.rmtree(folder)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    k = config.evaluation.samples_per_prompt
    failed = [
        f"  {figures[f'reward/outcome/{kind}']} gradings ended as {kind}\n"
        for kind in OUTCOMES
        if kind != "graded" and figures[f"reward/outcome/{kind}"]
    ]
    return "".join(failed) + (
        f"{checkpoint}: {len(prompts)} prompts, {k} responses each\n"
        f"  avg@{k}   {figures['accuracy']:.3f}\n  pass@{k}  {figures['pass_at_k']:.3f}\n"
        f"  response length {figures['response/length_mean']:.1f} tokens, "
        f"{figures['response/truncated_share']:.1%} cut off"
    )
