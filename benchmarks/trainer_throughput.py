"""The trainer against transformers on a CPU: the same weights, the same sequences, forward + backward and a whole step.

    OMP_NUM_THREADS=1 python benchmarks/trainer_throughput.py --out results/trainer_throughput.json

One process, one thread, fp32, both with AdamW. transformers takes the batch in each of the `SETUPS`; the fastest
of them is what the trainer is compared with. Both must give the same loss and the
same gradients, otherwise this fails. Time is the process's CPU time, so other work on the machine counts less; the two
take turns, and the ratios are of neighbours.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.checkpoint.export import export_hf_folder
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.config import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.objective.metrics import LossMetrics
from megatron_vespo.packing.batch import MicroBatch, TrainingSequence, pack
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.rendezvous import listen

TINY_BASE = "examples/tiny_base"
MODELS = {
    "tiny_base": {},
    "larger": {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 512},
}
"""Changes to TINY_BASE's config.json."""
SEQUENCES = 48
LENGTHS = {"unequal": (32, 128), "equal": (80, 80)}
"""Positions of each sequence, drawn from this range: about one micro-batch of the quickstart (4,096 tokens)."""
Setup = tuple[str, str, str]
"""Of transformers: how the batch is laid out (`LAYOUTS`), its experts and its attention."""
IGNORED = -100
OPTIMIZER = OptimizerConfig(learning_rate=1e-5, gradient_clip=1e3)
"""Both compute the norm for clipping, and neither clips."""
TOLERANCE = 1e-5
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Seconds:
    """CPU seconds of one training step; `optimizer` is the part after forward and backward."""

    total: float
    optimizer: float

    @property
    def forward_backward(self) -> float:
        return self.total - self.optimizer


class OurTrainer:
    """MegatronPolicy as a training run has it, on one rank."""

    def __init__(self, folder: Path, sequences: list[TrainingSequence]):
        self.folder, self.architecture = folder, read_architecture(folder)
        self.policy = MegatronPolicy(
            self.architecture,
            ModelConfig(path=str(folder), dtype="float32"),
            PolicyConfig(ranks=1),
            OPTIMIZER,
            total_steps=10**6,
            seed=1,
            rank=0,
            world_size=1,
            master=listen("127.0.0.1", 0),
            temperature=1.0,
        )
        load_hf_weights(self.policy.model, self.architecture, folder)
        self.policy.weights_were_loaded()
        self.micro_batch = pack(sequences)
        self.optimizer_seconds = 0.0
        self.policy.optimizer.step = self._timed(self.policy.optimizer.step)

    def _timed(self, step: Callable) -> Callable:
        def timed():
            started = time.process_time()
            result = step()
            self.optimizer_seconds = time.process_time() - started
            return result

        return timed

    def step(self) -> tuple[float, Seconds]:
        """The loss and what it took."""
        started = time.process_time()
        result = self.policy.train_step([self.micro_batch], negative_log_likelihood)
        return result.loss, Seconds(time.process_time() - started, self.optimizer_seconds)

    def gradients(self, target: Path) -> dict[str, Tensor]:
        """Of the last step, under Hugging Face's names: written out as if they were the weights, which they replace."""
        for chunk in self.policy.model:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        export_hf_folder(self.policy.model, self.architecture, self.folder, target)
        return load_file(target / "model.safetensors")


def negative_log_likelihood(scores: TokenScores, _: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
    """Sum and count: the trainer divides, so the step's loss is the mean over tokens."""
    return -scores.log_probs.sum(), torch.tensor(scores.log_probs.numel()), LossMetrics()


class Transformers:
    """Qwen3MoeForCausalLM and torch's AdamW, on batches in one of `LAYOUTS`."""

    def __init__(self, folder: Path, sequences: list[TrainingSequence], layout: str, experts: str, attention: str):
        self.model = Qwen3MoeForCausalLM.from_pretrained(
            folder, attn_implementation=attention, experts_implementation=experts, dtype=torch.float32
        ).train()
        self.batches = list(LAYOUTS[layout](sequences))
        self.count = sum(len(s.token_ids) - 1 for s in sequences)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=OPTIMIZER.betas,
            eps=OPTIMIZER.epsilon,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )

    def step(self) -> tuple[float, Seconds]:
        started = time.process_time()
        self.optimizer.zero_grad()
        loss = 0.0
        for inputs, labels in self.batches:
            logits = self.model(**inputs, use_cache=False).logits
            summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
            (summed / self.count).backward()
            loss += summed.item() / self.count
        forward_backward_done = time.process_time()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.gradient_clip)
        self.optimizer.step()
        done = time.process_time()
        return loss, Seconds(done - started, done - forward_backward_done)

    def gradients(self, target: Path) -> dict[str, Tensor]:
        """As `OurTrainer.gradients`."""
        for parameter in self.model.parameters():
            parameter.data.copy_(parameter.grad)
        self.model.save_pretrained(target)
        return load_file(target / "model.safetensors")


Batch = tuple[dict[str, Tensor], Tensor]


def padded(groups: int, mask: bool, sequences: list[TrainingSequence]) -> Iterator[Batch]:
    """Right-padded, in groups of similar length. A causal model needs no mask for padding on the right."""
    by_length = sorted(sequences, key=lambda s: len(s.token_ids))
    for group in np.array_split(np.arange(len(by_length)), groups):
        tokens = [torch.as_tensor(by_length[i].token_ids).long() for i in group]
        ids = torch.nn.utils.rnn.pad_sequence([t[:-1] for t in tokens], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([t[1:] for t in tokens], batch_first=True, padding_value=IGNORED)
        yield {"input_ids": ids, **({"attention_mask": (labels != IGNORED).long()} if mask else {})}, labels


def packed(groups: int, sequences: list[TrainingSequence]) -> Iterator[Batch]:
    """Behind each other, told apart by positions that start again; torch's attention gets a mask for it."""
    for group in np.array_split(np.arange(len(sequences)), groups):
        tokens = [torch.as_tensor(sequences[i].token_ids).long() for i in group]
        positions = torch.cat([torch.arange(len(t) - 1) for t in tokens])
        inputs = {"input_ids": torch.cat([t[:-1] for t in tokens])[None], "position_ids": positions[None]}
        yield inputs, torch.cat([t[1:] for t in tokens])[None]


LAYOUTS: dict[str, Callable[[list[TrainingSequence]], Iterator[Batch]]] = {
    "padded with attention mask": lambda sequences: padded(1, True, sequences),
    **{
        f"padded in {groups} batches by length": lambda sequences, groups=groups: padded(groups, False, sequences)
        for groups in (1, 2, 4, 8, SEQUENCES)
    },
    "packed": lambda sequences: packed(1, sequences),
    "packed in 4 batches": lambda sequences: packed(4, sequences),
}
SETUPS: list[Setup] = [
    *itertools.product(LAYOUTS, ("grouped_mm", "eager"), ("sdpa", "eager")),
    ("padded in 4 batches by length", "batched_mm", "sdpa"),  # ten times slower, so once is enough
]


def write_model(folder: Path, changes: dict) -> int:
    """Random weights, far from uniform routing and attention. Returns the number of parameters."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(TINY_BASE, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def draw(lengths: tuple[int, int], vocabulary: int) -> list[TrainingSequence]:
    """Without token 0, which pads: transformers gives it no gradient."""
    random = np.random.default_rng(0)
    return [
        TrainingSequence(
            token_ids=random.integers(1, vocabulary, n + 1).astype(np.int32),
            label_mask=np.ones(n, dtype=np.bool_),
            old_log_probs=np.zeros(n, dtype=np.float32),
            advantage=1.0,
            key=key,
        )
        for key, n in enumerate(random.integers(lengths[0], lengths[1] + 1, SEQUENCES))
    ]


def setups_by_speed(folder: Path, sequences: list[TrainingSequence], repetitions: int) -> dict[Setup, float]:
    """CPU milliseconds of forward + backward in each of transformers' setups, fastest first."""
    found: dict[Setup, float] = {}
    for setup in SETUPS:
        trainer = Transformers(folder, sequences, *setup)
        milliseconds = [trainer.step()[1].forward_backward * 1e3]
        if milliseconds[0] < 3 * min(found.values(), default=math.inf):  # else out of the question
            milliseconds = [trainer.step()[1].forward_backward * 1e3 for _ in range(repetitions)]
        found[setup] = statistics.median(milliseconds)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def same_work(folder: Path, sequences: list[TrainingSequence], setup: Setup) -> dict[str, float]:
    """How far loss and gradients of the two are apart in the first step. Raises RuntimeError above TOLERANCE."""
    transformers = Transformers(folder, sequences, *setup)
    with tempfile.TemporaryDirectory() as scratch, our_trainer(folder, sequences) as ours:
        losses = [trainer.step()[0] for trainer in (ours, transformers)]
        mine, theirs = ours.gradients(Path(scratch) / "ours"), transformers.gradients(Path(scratch) / "theirs")
    if mine.keys() != theirs.keys():
        raise RuntimeError(f"gradients of different weights: {mine.keys() ^ theirs.keys()}")
    found = {
        "loss_difference": abs(losses[0] - losses[1]),
        "largest_gradient_difference": max((mine[name] - theirs[name]).abs().max().item() for name in mine),
        "largest_gradient": max(gradient.abs().max().item() for gradient in theirs.values()),
    }
    if max(found["loss_difference"], found["largest_gradient_difference"]) > TOLERANCE:
        raise RuntimeError(f"the two did not do the same work: {found}")
    return found


@contextlib.contextmanager
def our_trainer(folder: Path, sequences: list[TrainingSequence]) -> Iterator[OurTrainer]:
    trainer = OurTrainer(folder, sequences)
    try:
        yield trainer
    finally:
        trainer.policy.close()


def measure(folder: Path, sequences: list[TrainingSequence], setup: Setup, repetitions: int) -> dict:
    """Both take turns at training steps. Raises RuntimeError if their losses part."""
    theirs = Transformers(folder, sequences, *setup)
    with our_trainer(folder, sequences) as ours:
        trainers = {"ours": ours, "transformers": theirs}
        times: dict[str, list[Seconds]] = {name: [] for name in trainers}
        for number in range(WARM_UP + repetitions):
            losses = {}
            for name in trainers if number % 2 else reversed(trainers):
                losses[name], seconds = trainers[name].step()
                times[name].append(seconds)
            if abs(losses["ours"] - losses["transformers"]) > TOLERANCE:
                raise RuntimeError(f"after {number} steps the losses are {losses}")
        operators = {name: operator_milliseconds(trainer) for name, trainer in trainers.items()}
    tokens = sum(len(s.token_ids) - 1 for s in sequences)
    phases = {"forward_backward": "forward_backward", "step": "total"}
    return {
        **{phase: phase_figures(times, part, tokens) for phase, part in phases.items()},
        "operators_ms": operators,
    }


def phase_figures(times: dict[str, list[Seconds]], part: str, tokens: int) -> dict:
    seconds = {name: [getattr(s, part) for s in taken[WARM_UP:]] for name, taken in times.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        **{f"{name}_tokens_per_second": round(tokens / statistics.median(taken)) for name, taken in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def operator_milliseconds(trainer: OurTrainer | Transformers, shown: int = 14) -> dict[str, float]:
    """Of one training step, the fastest of five: torch's operators by the time that each spent itself, and their sum."""
    steps = []
    for _ in range(5):
        with profile(activities=[ProfilerActivity.CPU]) as taken:
            trainer.step()
        steps.append({event.key: event.self_cpu_time_total / 1e3 for event in taken.key_averages()})
    fastest = min(steps, key=lambda operators: sum(operators.values()))
    top = sorted(fastest, key=fastest.__getitem__, reverse=True)[:shown]
    return {"all": round(sum(fastest.values()), 2), **{name: round(fastest[name], 2) for name in top}}


def compare(model: str, lengths: str, repetitions: int) -> dict:
    """One row of the results."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_model(folder, MODELS[model])
        sequences = draw(LENGTHS[lengths], read_architecture(folder).vocab_size)
        setups = setups_by_speed(folder, sequences, max(3, repetitions // 8))
        chosen = next(iter(setups))
        agreement = same_work(folder, sequences, chosen)
        figures = measure(folder, sequences, chosen, repetitions)
    return {
        "model": model,
        "parameters": parameters,
        "lengths": lengths,
        "tokens": sum(len(s.token_ids) - 1 for s in sequences),
        "transformers_setup": ", ".join(chosen),
        **figures,
        "agreement": agreement,
        "transformers_setups_ms": {", ".join(setup): round(ms, 2) for setup, ms in setups.items()},
    }


def table(rows: list[dict]) -> str:
    lines = ["model | lengths | ours, tokens/s | transformers, tokens/s | ours / transformers (min-max)"]
    for row in rows:
        for phase in ("forward_backward", "step"):
            found = row[phase]
            ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**found["ratio"])
            lines.append(
                f"{row['model']} | {row['lengths']} | {phase} | {found['ours_tokens_per_second']:,} | "
                f"{found['transformers_tokens_per_second']:,} | {ratio} | {row['transformers_setup']}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--out", type=Path, help="write every figure here, as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "megatron-core")},
    }
    rows = [compare(model, lengths, options.repetitions) for model in options.models for lengths in options.lengths]
    print(table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
