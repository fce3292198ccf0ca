"""Memory and speed of the chunked output head against log_softmax of all logits, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/head.py --out results/head.json

Memory is the peak of a process of its own, less what it held before (inputs and weights) and less the weight gradient.
Speed is compared at fewer tokens, since all logits of many do not fit: both take turns in one process, and each ratio
comes from two neighbouring measurements. On a GPU (the default where there is one) memory is that of torch's allocator.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.config import PolicyConfig
from megatron_vespo.policy.head import token_scores

GB = 1e9


@dataclass
class Setup:
    hidden: int
    vocabulary: int
    chunk_tokens: int
    dtype: str
    device: str

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight, labels, and the gradient that comes back to the log-probs."""
        torch.manual_seed(0)
        options = {"dtype": getattr(torch, self.dtype), "device": self.device}
        hidden = torch.randn(tokens, self.hidden, **options)
        weight = torch.randn(self.vocabulary, self.hidden, **options).mul_(self.hidden**-0.5)
        labels = torch.randint(self.vocabulary, (tokens,), device=self.device)
        return (
            hidden.requires_grad_(),
            weight.requires_grad_(),
            labels,
            torch.randn(tokens, device=self.device),
        )


def chunked(setup: Setup, hidden: Tensor, weight: Tensor, labels: Tensor, with_entropy: bool = False) -> list[Tensor]:
    scores = token_scores(
        hidden,
        weight,
        labels,
        temperature=1.0,
        chunk_tokens=setup.chunk_tokens,
        vocab_size=setup.vocabulary,
        with_entropy=with_entropy,
    )
    return [score for score in scores if score is not None]


def chunked_with_entropy(setup: Setup, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    return chunked(setup, hidden, weight, labels, with_entropy=True)


def naive(setup: Setup, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    log_probs = (hidden @ weight.T).float().log_softmax(dim=-1)
    return [log_probs.gather(1, labels[:, None]).squeeze(1)]


def naive_with_entropy(setup: Setup, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    log_probs = (hidden @ weight.T).float().log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return [log_probs.gather(1, labels[:, None]).squeeze(1), entropy]


Head = Callable[[Setup, Tensor, Tensor, Tensor], list[Tensor]]
PAIRS: list[tuple[Head, Head]] = [(chunked, naive), (chunked_with_entropy, naive_with_entropy)]


def peak_bytes(setup: Setup, head: Head, tokens: int) -> int:
    """Above inputs, weights and weight gradient. For a process that did nothing else."""
    hidden, weight, labels, upstream = setup.inputs(tokens)
    on_gpu = setup.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    outputs = head(setup, hidden, weight, labels)
    torch.autograd.backward(outputs, [upstream] * len(outputs))
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return peak - before - weight.numel() * weight.element_size()


def resident(field: str) -> int:
    """VmRSS: this process's memory now; VmHWM: at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(setup: Setup, head: Head, tokens: int) -> float:
    """`peak_bytes` of a new process, in GB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        found = process.submit(peak_bytes, setup, head, tokens).result() / GB
    print(f"{head.__name__}: {tokens:,} tokens, {found:.3f} GB above inputs, weights and weight gradient", flush=True)
    return found


def seconds(setup: Setup, head: Head, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """By clock. On a CPU also the process's own time, which on a shared machine says more than the wall's."""
    clocks = {"wall": time.perf_counter} | ({} if setup.device == "cuda" else {"cpu": time.process_time})
    hidden, weight, labels, upstream = inputs
    hidden.grad = weight.grad = None
    synchronize(setup)
    started = {name: clock() for name, clock in clocks.items()}
    outputs = head(setup, hidden, weight, labels)
    torch.autograd.backward(outputs, [upstream] * len(outputs))
    synchronize(setup)
    return {name: clock() - started[name] for name, clock in clocks.items()}


def synchronize(setup: Setup) -> None:
    if setup.device == "cuda":
        torch.cuda.synchronize()


def speed(setup: Setup, ours: Head, theirs: Head, tokens: int, repetitions: int) -> dict:
    inputs = setup.inputs(tokens)
    # The first of each warms up: library initialisation, and on a CPU the allocator's pages.
    pairs = [(seconds(setup, ours, inputs), seconds(setup, theirs, inputs)) for _ in range(repetitions + 1)][1:]
    found = {}
    for clock in pairs[0][0]:
        ratios = [their[clock] / our[clock] for our, their in pairs]
        found[clock] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        numbers = "{median:.2f} ({min:.2f}-{max:.2f})".format(**found[clock])
        print(f"{ours.__name__}: {numbers} times the speed of {theirs.__name__}, {clock} time", flush=True)
    return {
        "head": ours.__name__,
        f"{ours.__name__}_seconds": [our for our, _ in pairs],
        f"{theirs.__name__}_seconds": [their for _, their in pairs],
        "times_the_naive_speed": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="of the memory measurement")
    parser.add_argument("--compared-tokens", type=int, default=2_048, help="of the comparison with all logits at once")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk-tokens", type=int, default=PolicyConfig().head_chunk_tokens)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write every measurement here, as JSON")
    options = parser.parse_args()

    setup = Setup(options.hidden, options.vocabulary, options.chunk_tokens, options.dtype, options.device)
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        **({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "versions": {"torch": importlib.metadata.version("torch")},
        **asdict(setup),
        "tokens": options.tokens,
        "compared_tokens": options.compared_tokens,
    }
    found["gigabytes"] = {ours.__name__: memory(setup, ours, options.tokens) for ours, _ in PAIRS}
    found["gigabytes_at_compared_tokens"] = {
        head.__name__: memory(setup, head, options.compared_tokens) for pair in PAIRS for head in pair
    }
    found["speed"] = [
        speed(setup, ours, theirs, options.compared_tokens, options.repetitions) for ours, theirs in PAIRS
    ]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
