"""Time and peak memory of VESPO's loss, forward and backward, against TRL's function and the published formula.

    OMP_NUM_THREADS=1 python benchmarks/objective.py --run runs/quickstart --out results/objective.json

All three get the same sequences, ours packed, the others padded to the longest, as they take them, and give the same
loss and gradient; otherwise this fails. One process, turn by turn, medians of CPU time (the machine may be shared).
`--run`: a finished run of the quickstart, for the share of its optimizer step that the objective takes with all
diagnostics.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective import LossMetrics, policy_loss
from megatron_vespo.objective.diagnostics import difference_diagnostics, token_diagnostics, weight_diagnostics
from megatron_vespo.objective.kernels import largest_coefficient
from megatron_vespo.objective.loss import LossInputs, evaluate
from megatron_vespo.objective.packed import Packed
from megatron_vespo.observability.run_folder import read_run

SEQUENCES, FILL = 64, 0.45
LENGTHS = (512, 2048, 8192)
OBJECTIVE = ObjectiveConfig()


@dataclass
class Batch:
    """Ours is packed: [t]. Theirs is padded: [SEQUENCES, longest]."""

    log_probs: Tensor
    old: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    advantages: Tensor
    padded_log_probs: Tensor
    padded_old: Tensor
    padded_mask: Tensor


def batch(longest: int, fill: float, sequences: int = SEQUENCES, seed: int = 0) -> Batch:
    """Lengths from 1 to `longest`, in the mean `fill` of it, all of them response tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(sequences, generator=generator) * 2 * fill * longest).long().clamp(1, longest)
    lengths[0] = longest
    lengths[1:] = (lengths[1:] * (fill * longest * sequences - longest) / lengths[1:].sum()).long().clamp(1, longest)
    tokens = int(lengths.sum())
    log_probs = -torch.rand(tokens, generator=generator)
    # log W of about the same spread whatever the length
    old = log_probs + torch.randn(tokens, generator=generator) * 0.5 / math.sqrt(fill * longest)
    parts = [torch.split(values, lengths.tolist()) for values in (log_probs, old, torch.ones(tokens))]
    padded = [pad_sequence(list(rows), batch_first=True) for rows in parts]
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    advantages = torch.randn(sequences, generator=generator)
    return Batch(
        log_probs.requires_grad_(),
        old,
        torch.ones(tokens, dtype=torch.bool),
        cu_seqlens,
        advantages,
        padded[0].requires_grad_(),
        padded[1],
        padded[2],
    )


def ours(data: Batch) -> Tensor:
    """The loss alone, as the others give it."""
    packed = Packed(data.mask, data.cu_seqlens)
    return evaluate(OBJECTIVE, LossInputs(data.log_probs, data.old, data.advantages, packed)).loss


def with_metrics(data: Batch) -> tuple[Tensor, LossMetrics]:
    return policy_loss(
        OBJECTIVE,
        log_probs=data.log_probs,
        old_log_probs=data.old,
        advantages=data.advantages,
        response_mask=data.mask,
        cu_seqlens=data.cu_seqlens,
    )


def trl_gamma_weights() -> Callable[..., Tensor]:
    """TRL's `get_gamma_weights`, out of its installed file: importing its trainer needs torchvision."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "trainer" / "grpo_trainer.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "get_gamma_weights":
            node.decorator_list = []
            scope = {"torch": torch, "math": math}
            exec(compile(ast.Module([node], []), "trl", "exec"), scope)
            return torch.no_grad()(scope["get_gamma_weights"])
    raise RuntimeError("this TRL has no get_gamma_weights")


GAMMA_WEIGHTS = trl_gamma_weights()


def trl(data: Batch) -> Tensor:
    """What TRL's GRPOTrainer._compute_loss does with loss_type="vespo": all loss types get coef_1, this one not using it."""
    advantages = data.advantages[:, None]
    log_ratio = data.padded_log_probs - data.padded_old
    coef_1 = torch.exp(log_ratio)  # noqa: F841
    phi = GAMMA_WEIGHTS(
        advantages=advantages,
        log_ratio_per_token=log_ratio,
        mask=data.padded_mask,
        importance_sampling_ratio=None,
    )
    per_token_loss = -phi * advantages * data.padded_log_probs
    return (per_token_loss * data.padded_mask).sum() / data.padded_mask.sum()


def formula(data: Batch) -> Tensor:
    """The paper's formula, written down with padding."""
    ratio = ((data.padded_log_probs - data.padded_old) * data.padded_mask).detach()
    weight = torch.exp(ratio.sum(1))
    positive = data.advantages >= 0
    c1, c2 = torch.where(positive, 2.0, 3.0), torch.where(positive, 3.0, 2.0)
    phi = weight**c1 * torch.exp(c2 * (1 - weight))
    per_token_loss = -(phi * data.advantages)[:, None] * data.padded_log_probs
    return (per_token_loss * data.padded_mask).sum() / data.padded_mask.sum()


CONTENDERS = {"ours": ours, "with_metrics": lambda data: with_metrics(data)[0], "trl": trl, "formula": formula}
PACKED = ("ours", "with_metrics")


def forward_backward(name: str, data: Batch) -> tuple[Tensor, Tensor]:
    loss = CONTENDERS[name](data)
    (gradient,) = torch.autograd.grad(loss, data.log_probs if name in PACKED else data.padded_log_probs)
    return loss.detach(), gradient


def check_equal(data: Batch) -> None:
    loss, gradient = forward_backward("ours", data)
    for other in ("trl", "formula"):
        their_loss, their_gradient = forward_backward(other, data)
        torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(gradient, their_gradient[data.padded_mask.bool()], rtol=1e-4, atol=1e-10)


def seconds(name: str, data: Batch) -> float:
    started = time.process_time()
    forward_backward(name, data)
    return time.process_time() - started


def peak_bytes(name: str, data: Batch) -> int:
    """Most that torch's tensors held at once beyond the inputs, from the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward_backward(name, data)
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def measure(longest: int, repetitions: int) -> dict:
    data = batch(longest, FILL)
    check_equal(data)
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repetitions):
        for name in CONTENDERS:
            taken[name].append(seconds(name, data))
    tokens = len(data.log_probs)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "sequences": SEQUENCES,
        "longest": longest,
        "tokens": tokens,
        "fill": tokens / data.padded_mask.numel(),
        "milliseconds": {name: value * 1e3 for name, value in medians.items()},
        "time_over_trl": {
            name: statistics.median(a / b for a, b in zip(taken[name], taken["trl"], strict=True)) for name in PACKED
        },
        "peak_bytes": {name: peak_bytes(name, data) for name in CONTENDERS},
    }


def share_of_step(run_dir: str, repetitions: int) -> dict:
    """The objective of one step of a run's size, with backward and all diagnostics, over the run's own step time."""
    run = read_run(run_dir)
    steps = run.kind("step")
    trajectories = run.config["algorithm"]["prompts_per_step"] * run.config["rollout"]["group_size"]
    tokens = statistics.mean(row["tokens/trained"] for row in steps)
    data = batch(round(2 * tokens / trajectories), 0.5, sequences=trajectories)
    taken = []
    for _ in range(repetitions):
        started = time.process_time()
        loss, metrics = with_metrics(data)
        torch.autograd.grad(loss, data.log_probs)
        sums = {name: float(value) for name, value in metrics.sums.items()}
        sequences = {name: values.double().numpy() for name, values in metrics.sequences.items()}
        weight_diagnostics(sequences, largest_coefficient(OBJECTIVE.kernel))
        difference_diagnostics(sums, "drift")
        token_diagnostics(sums)
        taken.append(time.process_time() - started)
    step = statistics.median(row["time/train"] for row in steps)
    return {
        "trajectories": trajectories,
        "tokens": len(data.log_probs),
        "objective_milliseconds": statistics.median(taken) * 1e3,
        "step_milliseconds": step * 1e3,
        "share": statistics.median(taken) / step,
    }


def table(rows: list[dict]) -> str:
    lines = ["longest |  tokens | ours, with metrics, TRL, formula: ms | over TRL | MB | bytes a token"]
    for row in rows:
        ms = ", ".join(f"{row['milliseconds'][name]:.2f}" for name in CONTENDERS)
        mb = ", ".join(f"{row['peak_bytes'][name] / 1e6:.1f}" for name in CONTENDERS)
        over = ", ".join(f"{row['time_over_trl'][name]:.2f}" for name in PACKED)
        each = ", ".join(f"{row['peak_bytes'][name] / row['tokens']:.1f}" for name in CONTENDERS)
        lines.append(f"{row['longest']:7} | {row['tokens']:7} | {ms} | {over} | {mb} | {each}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=51)
    parser.add_argument("--run", help="a finished run of the quickstart")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()

    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "trl")},
        "rows": [measure(longest, options.repetitions) for longest in LENGTHS],
    }
    print(table(found["rows"]))
    if options.run:
        found["step"] = share_of_step(options.run, options.repetitions)
        print("the objective takes {share:.2%} of the step ({objective_milliseconds:.2f} ms)".format(**found["step"]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
