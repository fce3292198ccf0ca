"""Shared by all rooms, each started by the first test that asks for it: one real SGLang server, four trainer ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_engine import RunningEngine, running_engine, write_tiny_qwen3_moe

from megatron_vespo.parity.pool import RankPool


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory) -> Path:
    """A folder in Hugging Face format, without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_qwen3_moe")
    write_tiny_qwen3_moe(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_qwen3_moe, tmp_path_factory) -> Iterator[RunningEngine]:
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with running_engine(tiny_qwen3_moe, log, return_routed_experts=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four processes that form Megatron's groups over gloo."""
    with RankPool(4, deadline_seconds=180) as pool:
        yield pool
