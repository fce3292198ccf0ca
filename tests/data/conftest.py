"""A small tokenizer of our own making, and the task that the quickstart uses."""

import importlib.util
from pathlib import Path

import pytest

from megatron_vespo.config import DataConfig, ReasoningGymSource
from megatron_vespo.data.tokenizer import ChatTokenizer, load_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_tiny_base.py"


@pytest.fixture(scope="session")
def make_tiny_base():
    """The module tools/make_tiny_base.py."""
    spec = importlib.util.spec_from_file_location("make_tiny_base", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def chain_sum() -> ReasoningGymSource:
    settings = {"min_terms": 4, "max_terms": 5, "min_digits": 1, "max_digits": 1}
    return ReasoningGymSource(type="reasoning_gym", task="chain_sum", settings=settings)


@pytest.fixture(scope="session")
def chain_sums(chain_sum) -> DataConfig:
    return DataConfig(sources=(chain_sum,))


@pytest.fixture(scope="session")
def model_folder(make_tiny_base, chain_sum, tmp_path_factory) -> Path:
    """An untrained Hugging Face folder: configuration, tokenizer, chat template."""
    import reasoning_gym

    folder = tmp_path_factory.mktemp("untrained")
    items = reasoning_gym.create_dataset("chain_sum", seed=3, size=100, **chain_sum.settings)
    make_tiny_base.write_untrained_model(folder, [item["question"] for item in items])
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder) -> ChatTokenizer:
    return load_tokenizer(model_folder)
