from collections.abc import Iterator

import pytest
from tiny_engine import write_tiny_qwen3_moe
from weight_trainer import Trainer, running_trainer


@pytest.fixture(scope="module")  # no longer: runs in the same process start a Ray of their own
def trainer(tmp_path_factory) -> Iterator[Trainer]:
    with running_trainer(tmp_path_factory.mktemp("trainer")) as trainer:
        yield trainer


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory):
    """A folder of the tiny model with other numbers."""
    folder = tmp_path_factory.mktemp("other_weights")
    write_tiny_qwen3_moe(folder, seed=1)
    return folder
