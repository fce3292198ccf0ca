"""Shared by all rooms, each started by the first test that asks for it: one real SGLang server, four trainer ranks."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_engine import RunningEngine, tiny_server, write_tiny_qwen3_moe

from megatron_vespo.parity.pool import RankPool
from megatron_vespo.rollout.client import EngineClient


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory) -> Path:
    """A folder in Hugging Face format, without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_qwen3_moe")
    write_tiny_qwen3_moe(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_qwen3_moe, tmp_path_factory) -> Iterator[RunningEngine]:
    server = tiny_server(tiny_qwen3_moe, tmp_path_factory.mktemp("engine") / "engine.log")
    loop = asyncio.new_event_loop()
    server.start()
    client = EngineClient(server.url, timeout_seconds=120, weights_timeout_seconds=60)
    try:
        yield RunningEngine(server, client, tiny_qwen3_moe, loop)
    finally:
        loop.run_until_complete(client.close())
        loop.close()
        server.stop()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four processes that form Megatron's groups over gloo."""
    with RankPool(4, deadline_seconds=180) as pool:
        yield pool
