from collections.abc import Iterator

import policy_ranks
import pytest


@pytest.fixture(scope="session")
def ranks() -> Iterator[policy_ranks.RankPool]:
    pool = policy_ranks.RankPool()
    yield pool
    pool.close()
