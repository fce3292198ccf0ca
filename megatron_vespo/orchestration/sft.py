"""Supervised training on demonstrations: the same policy, with cross-entropy in place of the objective."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_vespo.config import SFTConfig
from megatron_vespo.data.demonstrations import load_demonstrations
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.open_metrics import check_sinks, open_metrics
from megatron_vespo.observability.sinks import Metrics
from megatron_vespo.orchestration.cluster import gpus_per_process, interface_of
from megatron_vespo.orchestration.interruption import run_interruptible
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.preflight import check_model
from megatron_vespo.orchestration.run_folder import create_run_folder
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.packing.batch import TrainingSequence


def run_sft(config: SFTConfig, console: RunConsole) -> Path:
    """`megatron-vespo sft`. Writes run_dir/checkpoint and run_dir/metrics.jsonl; returns the checkpoint's folder.

    Raises:
        ConfigError: before anything was started.
        RunError: the run failed or was stopped.
    """
    interface = interface_of(config.cluster)
    check_sinks(config.observability)
    architecture, checkpoint_bytes = check_model(config.model, config.policy)
    tokenizer = load_tokenizer(config.model.path)
    demonstrations = load_demonstrations(config.demonstrations, tokenizer)
    folder = create_run_folder(config, config.run_dir, config.overwrite, checkpoint_bytes)

    async def main() -> None:
        console.phase("starting the trainer")
        async with Runtime(config.policy.ranks, folder, interface, config.cluster) as runtime:
            gpus = gpus_per_process(config.policy.ranks)
            policy = PolicyGroup(runtime, gpus, runtime.place(config.policy.ranks, 0, gpus))
            await policy.build(config, architecture, config.steps, temperature=1.0)
            await supervise(config, policy, demonstrations, metrics, console)
            console.phase("exporting the checkpoint")
            target = str(folder / "checkpoint")
            await policy.on_all("export the checkpoint", lambda actor, _: actor.export.remote(target, overwrite=False))

    with open_metrics(folder, config, console.event) as metrics:
        run_interruptible(main)
    return folder / "checkpoint"


async def supervise(
    config: SFTConfig,
    policy: PolicyGroup,
    demonstrations: list[TrainingSequence],
    metrics: Metrics,
    console: RunConsole,
) -> None:
    """`config.steps` optimizer steps; every demonstration is seen once before any is seen again."""
    console.phase("training")
    for step, batch in zip(
        range(1, config.steps + 1), batches(demonstrations, config.demonstrations.batch_size, config.seed), strict=False
    ):
        started = time.monotonic()
        report = await policy.train_step(batch, objective=None)
        tokens = sum(len(sequence.token_ids) - 1 for sequence in batch)
        row = {
            "loss": report.loss,
            "grad_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            "tokens/trained": tokens,
            "time/train": time.monotonic() - started,
            "speed/trained_tokens_per_second": tokens / (time.monotonic() - started),
        }
        console.progress(step, config.steps, "steps", f"loss {report.loss:.3f}")
        console.update(metrics.write("step", step, row))


def batches(demonstrations: list[TrainingSequence], size: int, seed: int) -> Iterator[list[TrainingSequence]]:
    """Endless. A new order for each pass over the demonstrations; a pass's last, smaller batch goes on into the next."""
    queue: list[int] = []
    epoch = 0
    while True:
        while len(queue) < size:
            queue += np.random.default_rng((seed, epoch)).permutation(len(demonstrations)).tolist()
            epoch += 1
        chosen, queue = queue[:size], queue[size:]
        yield [demonstrations[index].with_key(key) for key, index in enumerate(chosen)]
