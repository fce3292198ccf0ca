"""What answers turns runs where graders run: it can be killed, and no failure of it ends the run."""

import asyncio
import logging

import pytest

from megatron_vespo.config import ConfigError, CustomSource, DataConfig, FileSource, ReasoningGymSource, RewardConfig
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.scorers import build_environments


def source(environment: str | None) -> FileSource:
    return FileSource(type="file", path="unused.jsonl", scorer="graders:misbehave", environment=environment)


@pytest.fixture(scope="module")
def pool():
    data = DataConfig(sources=(source("graders:reply"), source(None)))
    with RewardPool(RewardConfig(timeout_seconds=1.0, memory_limit_mb=1024), data) as running:
        yield running


def test_only_sources_with_an_environment_are_asked(pool, trajectory):
    assert pool.replies_to(trajectory("yes").prompt) and not pool.replies_to(trajectory("yes", source=1).prompt)
    said = asyncio.run(pool.reply(trajectory("").prompt, "say wrong, again"))
    assert said == "wrong, again"
    assert asyncio.run(pool.reply(trajectory("").prompt, "yes")) is None
    assert pool.failed_replies == 0


@pytest.mark.parametrize("text", ["throw it", "hang", "die", "number"])
def test_a_failure_ends_the_response_and_is_counted_and_told(pool, trajectory, caplog, text):
    before = pool.failed_replies
    pool._reported.clear()
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(pool.reply(trajectory("").prompt, text)) is None
    assert pool.failed_replies == before + 1
    assert "a turn of prompt" in caplog.text and "the response ends there" in caplog.text
    graded = trajectory("yes")
    asyncio.run(pool.grade([graded]))
    assert graded.reward == 1.0


@pytest.mark.parametrize(
    ("of", "reference", "answer", "row"),
    [
        (CustomSource(type="custom", target="x:X"), {"answer": 7, "moves": 3}, {"answer": 7, "moves": 3}, None),
        (CustomSource(type="custom", target="x:X"), {"moves": 3}, {"moves": 3}, None),
        (CustomSource(type="custom", target="x:X"), {}, {}, None),
        (CustomSource(type="custom", target="x:X"), "seven", "seven", {}),
        (FileSource(type="file", path="x", answer_key="result"), {"result": 7, "answer": 8}, 7, None),
        (FileSource(type="file", path="x", answer_key=None), {"answer": 8}, None, None),
        (ReasoningGymSource(type="reasoning_gym", task="x"), {"answer": "7", "metadata": {}}, "7", None),
    ],
)
def test_an_environment_gets_the_answer_that_the_scorer_of_its_source_gets(of, reference, answer, row):
    """`row`: None for all that is known of the item."""
    (environment,) = build_environments({"s": of.model_copy(update={"environment": "graders:echo"})})
    assert environment is not None
    assert environment("said", reference) == repr(("said", answer, reference if row is None else row))


def test_an_environment_that_is_not_there_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.environment: module 'graders' has no 'nobody'"):
        build_environments({"data.sources.0": source("graders:nobody")})
