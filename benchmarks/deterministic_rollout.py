"""What deterministic sampling costs on a CPU: two real servers of one model, alike but for `rollout.deterministic`.

    python benchmarks/deterministic_rollout.py --out results/deterministic_rollout.json

They take turns at the same prompts, and every response has the full length, so that both sample the same number of
tokens. What the deterministic server sampled is the same, bit by bit, in every turn; otherwise this fails. The machine may be shared: compare the ratios, each of which comes from two measurements side by side.
"""

import argparse
import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.config import EngineConfig, TrainConfig, load_config
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generate import generate
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.server import EngineServer
from megatron_vespo.rollout.trajectory import Group

CONFIG = "examples/quickstart.yaml"
GROUPS, GROUP_SIZE, RESPONSE_TOKENS = 64, 8, 64
CONCURRENT_GROUPS = (1, 8, 64)
KINDS = {"deterministic": True, "stock": False}


class FixedLengthClient(EngineClient):
    """Samples up to the limit, whatever token would end a response."""

    async def generate(self, input_ids, sampling_params, request_ids, **options):
        sampling_params = [params | {"ignore_eos": True} for params in sampling_params]
        return await super().generate(input_ids, sampling_params, request_ids, **options)


def engine_server(config: TrainConfig, kind: str, logs: Path) -> EngineServer:
    return EngineServer(
        config.model.path,
        config.model.dtype,
        # Its cache holds all sequences at once. With the quickstart's smaller one the deterministic server would take
        # fewer requests side by side, and this would measure that.
        EngineConfig(),
        deterministic=KINDS[kind],
        seed=config.seed,
        log_path=logs / f"{kind}.log",
        max_sequence_tokens=config.data.max_prompt_tokens + RESPONSE_TOKENS,
        device="cpu",
    )


async def tokens_per_second(client: EngineClient, prompts: list[Prompt], generation: Generation) -> tuple[float, str]:
    """Sampled tokens a second from empty caches, and a digest of what was sampled."""
    await client.flush_cache()
    started = time.perf_counter()
    groups = [group async for group in generate(Fleet([client]), prompts, generation)]
    seconds = time.perf_counter() - started
    tokens = sum(len(trajectory.response_ids) for group in groups for trajectory in group.trajectories)
    if tokens != len(prompts) * GROUP_SIZE * RESPONSE_TOKENS:
        raise RuntimeError(f"{tokens} tokens were sampled: some response is shorter than {RESPONSE_TOKENS}")
    return tokens / seconds, digest(groups)


def digest(groups: list[Group]) -> str:
    """Of all tokens and the bits of their log-probs, whatever the order of completion."""
    found = hashlib.sha256()
    for group in sorted(groups, key=lambda group: group.prompt.identity):
        for trajectory in group.trajectories:
            found.update(trajectory.response_ids.tobytes() + trajectory.behavior_log_probs.tobytes())
    return found.hexdigest()


async def measure(servers: dict[str, EngineServer], config: TrainConfig, passes: int) -> list[dict]:
    """One row for each number of concurrent groups."""
    prompts = PromptStream(config.data, load_tokenizer(config.model.path), config.seed).take(GROUPS)
    common = {
        "samples": GROUP_SIZE,
        "sampling": config.rollout.sampling,
        "max_response_tokens": RESPONSE_TOKENS,
        "stop_token_ids": (),
        "vocab_size": read_architecture(config.model.path).vocab_size,
        "run_seed": config.seed,
        "stream": "benchmark",
        "weight_version": 0,
    }
    speeds = {concurrent: {kind: [] for kind in KINDS} for concurrent in CONCURRENT_GROUPS}
    digests = {kind: set() for kind in KINDS}
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            kind: await stack.enter_async_context(FixedLengthClient(server.url, token=server.token))
            for kind, server in servers.items()
        }
        for number in range(passes + 1):
            for concurrent in CONCURRENT_GROUPS if number else CONCURRENT_GROUPS[-1:]:
                for kind in KINDS if number % 2 else reversed(KINDS):
                    generation = Generation(**common, deterministic=KINDS[kind], concurrent_groups=concurrent)
                    speed, sampled = await tokens_per_second(clients[kind], prompts, generation)
                    print(f"pass {number}, {concurrent} groups, {kind}: {speed:,.0f} tokens/s", flush=True)
                    digests[kind].add(sampled)
                    if number:  # pass 0 warms up
                        speeds[concurrent][kind].append(speed)
    if len(digests["deterministic"]) != 1:
        raise RuntimeError("the deterministic server did not sample the same tokens and log-probs each time")
    return [row(concurrent, speeds[concurrent]) for concurrent in CONCURRENT_GROUPS]


def row(concurrent: int, speeds: dict[str, list[float]]) -> dict:
    ratios = [ours / theirs for ours, theirs in zip(speeds["deterministic"], speeds["stock"], strict=True)]
    return {
        "concurrent_groups": concurrent,
        **{f"{kind}_tokens_per_second": [round(speed, 1) for speed in speeds[kind]] for kind in KINDS},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def table(rows: list[dict]) -> str:
    lines = ["concurrent groups | deterministic tokens/s | stock tokens/s | deterministic/stock (min-max)"]
    for entry in rows:
        ours, theirs = (statistics.median(entry[f"{kind}_tokens_per_second"]) for kind in KINDS)
        ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**entry["ratio"])
        lines.append(f"{entry['concurrent_groups']:17} | {ours:22,.0f} | {theirs:14,.0f} | {ratio}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write every measurement here, as JSON")
    options = parser.parse_args()

    config = load_config(TrainConfig, CONFIG)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("sglang", "torch")},
        "model": config.model.path,
        "dtype": config.model.dtype,
        "groups": GROUPS,
        "group_size": GROUP_SIZE,
        "response_tokens": RESPONSE_TOKENS,
    }
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        servers = {kind: stack.enter_context(engine_server(config, kind, Path(logs))) for kind in KINDS}
        rows = asyncio.run(measure(servers, config, options.passes))
    print(table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
