"""Weights from two trainer ranks to two engines on one host, over each transport, against a plain gloo broadcast.

    OMP_NUM_THREADS=1 python benchmarks/weight_sync.py --out results/weight_sync.json

A random Qwen3-MoE in fp32 is in two real policy ranks (expert parallel, without a step taken, so without optimizer state)
and two real SGLang servers, which start with other numbers. A sync is what a run does: gather, send, load, flush. The
broadcast sends as many bytes, in as many buckets, from one process to two others that do nothing with them. Both take
turns; ratios are of neighbours. Every tensor is verified by checksum at each transport's first sync.

Memory: the kernel's peak of each process' resident memory during a sync, less what was resident before the first sync of
all, in units of `--bucket-mb`. Pages of shared memory count in each process that has touched them.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.config import EngineConfig, TrainConfig, WeightSyncConfig, load_config
from megatron_vespo.interface import LOOPBACK
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.weight_updater import SyncReport, WeightUpdater
from megatron_vespo.rendezvous import host_store, join_store, listen, port_of
from megatron_vespo.rollout import process_tree
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.server import EngineServer

TRANSPORTS = ("shared_memory", "collective", "disk")
TIMEOUT = timedelta(seconds=600)
HIDDEN, EXPERT_WIDTH, EXPERTS, VOCABULARY = 1024, 512, 16, 8192
LAYER_BYTES = 4 * HIDDEN * (2 * 1024 + 2 * 256 + 3 * EXPERTS * EXPERT_WIDTH)
OTHER_BYTES = 4 * 2 * VOCABULARY * HIDDEN


def write_config(folder: Path, gigabytes: float) -> None:
    layers = max(1, math.ceil((gigabytes * 1e9 - OTHER_BYTES) / LAYER_BYTES))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


class Broadcast:
    """Three processes, this one among them, in a gloo group."""

    def __init__(self, bucket_bytes: int) -> None:
        listener, context = listen(LOOPBACK.address), multiprocessing.get_context("spawn")
        port = port_of(listener)
        self._orders = [context.SimpleQueue() for _ in range(2)]
        self._processes = [
            context.Process(target=receive, args=(rank + 1, port, bucket_bytes, orders), daemon=True)
            for rank, orders in enumerate(self._orders)
        ]
        for process in self._processes:
            process.start()
        self.pids = [os.getpid(), *(process.pid for process in self._processes if process.pid is not None)]
        dist.init_process_group("gloo", store=host_store(listener, 3, TIMEOUT), rank=0, world_size=3, timeout=TIMEOUT)
        self._bucket = torch.ones(bucket_bytes, dtype=torch.uint8)

    def seconds(self, sizes: list[int]) -> float:
        for orders in self._orders:
            orders.put(sizes)
        dist.barrier()
        started = time.perf_counter()
        for size in sizes:
            dist.broadcast(self._bucket[:size], src=0)
        dist.barrier()
        return time.perf_counter() - started

    def close(self) -> None:
        for orders in self._orders:
            orders.put(None)
        for process in self._processes:
            process.join()
        dist.destroy_process_group()


def receive(rank: int, port: int, bucket_bytes: int, orders) -> None:
    store = join_store(LOOPBACK.address, port, 3, TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=TIMEOUT)
    bucket = torch.zeros(bucket_bytes, dtype=torch.uint8)
    while (sizes := orders.get()) is not None:
        dist.barrier()
        for size in sizes:
            dist.broadcast(bucket[:size], src=0)
        dist.barrier()
    dist.destroy_process_group()


@contextmanager
def processor_seconds(pids: list[int], found: dict[str, float]):
    """User and kernel time that processes spend, into `found`."""
    processes = [psutil.Process(pid) for pid in pids]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    yield
    found["cpu"] = sum(sum(process.cpu_times()[:2]) for process in processes) - before


@contextmanager
def peak_memory(pids: dict[str, int], found: dict[str, int]):
    """The most bytes of processes that were resident meanwhile, if more than there are; into `found`."""
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    yield
    for name, pid in pids.items():
        found[name] = max(found.get(name, 0), memory(pid, "VmHWM"))


def memory(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def largest_process(pid: int) -> int:
    """Of an engine: the one that holds the weights."""
    return max(process_tree.tree(pid), key=lambda process: process.memory_info().rss).pid


async def measure(arguments: argparse.Namespace, root: Path, stack: AsyncExitStack) -> dict:
    write_config(root, arguments.gb)
    runtime = await stack.enter_async_context(Runtime(2, root / "run", LOOPBACK))
    policy = PolicyGroup(runtime, 0, runtime.place(2, 0, 0))
    config = load_config(
        TrainConfig,
        "examples/quickstart.yaml",
        [f"model.path={root}", "model.initialization=random", "policy.layout={ep: 2}", "evaluation.exclude=[]"],
    )
    await policy.build(config, read_architecture(root), total_steps=1, temperature=1.0)
    clients = [await start_engine(root, name, stack) for name in ("engine 0", "engine 1")]
    broadcast = Broadcast(2 * int(arguments.bucket_mb * 2**20))
    stack.callback(broadcast.close)

    def updater(transport: str) -> WeightUpdater:
        disk = {"folder": str(root / "weights")}
        settings = {"bucket_mb": arguments.bucket_mb, "verify_every": 10**6, "transport": transport, "disk": disk}
        return WeightUpdater(
            policy, runtime.supervisor, WeightSyncConfig(**settings), engine_dtype="float32", backend="gloo"
        )

    family = [os.getpid(), *(process.pid for _, pid in clients for process in process_tree.tree(pid))]
    actors = [await actor.__ray_call__.remote(lambda _: os.getpid()) for actor in policy.ranks]
    pids = {f"trainer rank {rank}": pid for rank, pid in enumerate(actors)}
    pids |= {name: largest_process(pid) for name, (_, pid) in zip(("engine 0", "engine 1"), clients, strict=True)}
    before = {name: memory(pid, "VmRSS") for name, pid in pids.items()}
    setup = Setup([client for client, _ in clients], broadcast, pids, before, [*family, *actors], arguments)
    return {name: await one_transport(updater(name), setup) for name in arguments.transports}


async def start_engine(root: Path, name: str, stack: AsyncExitStack) -> tuple[EngineClient, int]:
    settings = EngineConfig(
        max_total_tokens=512, max_running_requests=2, memory_fraction=0.6, extra_arguments={"load-format": "dummy"}
    )
    server = EngineServer(
        *(str(root), "float32", settings),
        deterministic=False,
        seed=0,
        log_path=root / f"{name}.log",
        max_sequence_tokens=128,
    )
    await asyncio.to_thread(server.start)
    stack.callback(server.stop)
    client = EngineClient(server.url, name=name, token=server.token)
    stack.push_async_callback(client.close)
    return client, server.pid


@dataclass(frozen=True)
class Setup:
    engines: list[EngineClient]
    broadcast: Broadcast
    pids: dict[str, int]
    """Whose memory is measured."""
    before: dict[str, int]
    """Their resident bytes before the first sync."""
    family: list[int]
    """All that take part in a sync."""
    arguments: argparse.Namespace


async def one_transport(updater: WeightUpdater, setup: Setup) -> dict:
    peaks: dict[str, int] = {}
    with peak_memory(setup.pids, peaks):
        first = await updater.sync(0, setup.engines)
    sizes = [bucket.num_bytes for bucket in updater.buckets]
    plain = await broadcast_seconds(setup, sizes)
    pairs: list[dict[str, float]] = []
    for version in range(1, setup.arguments.repeats + 1):
        used: dict[str, float] = {}
        with peak_memory(setup.pids, peaks), processor_seconds(setup.family, used):
            report = await updater.sync(version, setup.engines)
        before, plain = plain, await broadcast_seconds(setup, sizes)
        both = {name: (before[name] + plain[name]) / 2 for name in plain}
        pairs.append({**both, "sync": report.total_seconds, "sync_cpu": used["cpu"], **report.seconds})
        print(report.transport, {name: round(value, 3) for name, value in pairs[-1].items()}, flush=True)
    await updater.disconnect()
    extra = {name: peak - setup.before[name] for name, peak in peaks.items()}
    return summary(first, pairs, extra, int(setup.arguments.bucket_mb * 2**20))


async def broadcast_seconds(setup: Setup, sizes: list[int]) -> dict[str, float]:
    used: dict[str, float] = {}
    with processor_seconds(setup.broadcast.pids, used):
        seconds = await asyncio.to_thread(setup.broadcast.seconds, sizes)
    return {"broadcast": seconds, "broadcast_cpu": used["cpu"]}


def summary(first: SyncReport, pairs: list[dict], extra: dict[str, int], bucket_bytes: int) -> dict:
    ratios = [pair["sync"] / pair["broadcast"] for pair in pairs]
    cpu = statistics.median(pair["sync_cpu"] / pair["broadcast_cpu"] for pair in pairs)
    result = {
        "bytes": first.bytes,
        "buckets": first.buckets,
        "sync_over_broadcast": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "cpu_over_broadcast": cpu,
        "median_seconds": {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]},
        "first": first.seconds,
        "verify_over_broadcast": first.seconds["verify"] / statistics.median(pair["broadcast"] for pair in pairs),
        "extra_memory_in_buckets": {name: number / bucket_bytes for name, number in extra.items()},
        "pairs": pairs,
    }
    print(first.transport, json.dumps({name: value for name, value in result.items() if name != "pairs"}, indent=1))
    return result


async def run(arguments: argparse.Namespace, root: Path) -> dict:
    async with AsyncExitStack() as stack:
        return await measure(arguments, root, stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="10^9 bytes of weights, at least")
    parser.add_argument("--bucket-mb", type=float, default=128.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    started = time.time()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weight-sync-")))
        results = asyncio.run(run(arguments, root))
    if arguments.out is not None:
        settings = {"gb": arguments.gb, "bucket_mb": arguments.bucket_mb, "repeats": arguments.repeats}
        machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "memory_gb": psutil.virtual_memory().total / 1e9}
        content = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.time() - started}
        content |= {"machine": machine, "settings": settings, "results": results}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
