"""Each kind of source gets the scorer that its configuration means, and it gives the rewards that one expects."""

import asyncio
import sys
import time

import pytest
import reasoning_gym

from megatron_vespo.config import ConfigError, CustomSource, DataConfig, FileSource, ReasoningGymSource, RewardConfig
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.scorers import build_scorer, build_scorers

CHAIN_SUM = {"min_terms": 3, "max_terms": 5}


def file_scorer(scorer, answer_key="answer"):
    return build_scorer(FileSource(type="file", path="x.jsonl", scorer=scorer, answer_key=answer_key), "data.sources.0")


class Parity:
    """A source with a score of its own."""

    name = "parity"
    size = None

    def __init__(self, seed: int, bonus: float = 0.0):
        self.bonus = bonus

    def item(self, index):
        raise AssertionError("not asked for")

    def score(self, response, reference) -> float:
        return float(int(response) % 2 == reference) + self.bonus


class Unscored:
    def __init__(self, seed):
        pass


def test_reasoning_gym_tasks_are_graded_by_their_own_scorer():
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1, **CHAIN_SUM)[0]
    entry["answer"] = "12"
    full = build_scorer(ReasoningGymSource(type="reasoning_gym", task="chain_sum", settings=CHAIN_SUM), "k")
    partial = build_scorer(
        ReasoningGymSource(type="reasoning_gym", task="chain_sum", settings=CHAIN_SUM, partial_credit=True), "k"
    )
    right = ("<answer>12</answer>", "so <answer>5</answer>, no, <answer> +12.0 </answer>.")
    wrong = ("<answer>13</answer>", "12", "<answer>12", "<answer></answer>", "")
    assert [full(text, entry) for text in right] == [1.0, 1.0]
    assert [full(text, entry) for text in wrong] == [0.0] * 5
    assert full("<answer>it is 12 now</answer>", entry) == 0.0
    assert 0.0 < partial("<answer>it is 12 now</answer>", entry) < 1.0


def test_exact_match_compares_the_answer_or_else_all_that_was_said():
    score = file_scorer("exact_match")
    assert score("thinking <answer> a b </answer>", {"answer": "a b"}) == 1.0
    assert score(" 7\n", {"answer": 7}) == 1.0
    assert score("7.0", {"answer": 7}) == 0.0
    assert score("it is 7", {"answer": 7}) == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("so it is $\\boxed{\\frac{1}{2}}$", "0.5", 1.0),
        ("so it is $\\boxed{\\frac{1}{2}}$", "\\frac{2}{4}", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("The answer is 41.", "42", 0.0),
        ("$x = 3$", "$3$", 1.0),
        ("no idea", "42", 0.0),
    ],
)
def test_math_verify_compares_expressions(response, answer, expected):
    assert file_scorer("math_verify")(response, {"answer": answer}) == expected


def test_math_verify_says_when_the_reference_is_no_expression():
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        file_scorer("math_verify")("42", {"answer": ""})


def test_a_function_of_ones_own_gets_response_answer_and_row(tmp_path, monkeypatch):
    code = "def f(response, answer, row):\n    return [response, answer, row]\n"
    (tmp_path / "my_reward_of_this_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    row = {"prompt": "p", "gold": "a"}
    assert file_scorer("my_reward_of_this_test:f", "gold")("r", row) == ["r", "a", row]
    assert file_scorer("my_reward_of_this_test:f", None)("r", row) == ["r", None, row]


def test_custom_sources_score_themselves_or_name_a_scorer():
    own = CustomSource(type="custom", target=f"{__name__}:Parity", settings={"bonus": 0.5})
    assert build_scorer(own, "k")("3", 1) == 1.5
    named = CustomSource(type="custom", target=f"{__name__}:Unscored", scorer="exact_match")
    assert build_scorer(named, "k")("3", 3) == 1.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FileSource(type="file", path="x.csv"), r"data\.sources\.0\.scorer: no scorer is given for x\.csv"),
        (FileSource(type="file", path="x.csv", scorer="exactmatch"), "no scorer is called 'exactmatch'"),
        (FileSource(type="file", path="x.csv", scorer="json:nothing"), "has no 'nothing'"),
        (FileSource(type="file", path="x.csv", scorer="json:__name__"), "is not a function"),
        (CustomSource(type="custom", target=f"{__name__}:Unscored"), "has no method score"),
        (ReasoningGymSource(type="reasoning_gym", task="no_task"), "has no task 'no_task'"),
    ],
)
def test_a_task_without_a_scorer_is_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        build_scorers({"data.sources.0": source})


def test_512_responses_take_one_worker_less_than_a_second_and_no_torch(trajectory):
    sum_task = ReasoningGymSource(type="reasoning_gym", task="chain_sum", settings=CHAIN_SUM)
    probe = FileSource(type="file", path="unused", scorer="graders:torch_is_loaded")
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1, **CHAIN_SUM)[0] | {"answer": "3"}
    with RewardPool(RewardConfig(), DataConfig(sources=(sum_task, probe))) as pool:
        batch = [trajectory(f"1+2=3 <answer>{i % 4}</answer>", entry) for i in range(512)]
        started = time.monotonic()
        asyncio.run(pool.grade(batch))
        seconds = time.monotonic() - started
        other = trajectory("", source=1)
        asyncio.run(pool.grade([other]))
    assert [t.reward for t in batch] == [float(i % 4 == 3) for i in range(512)]
    assert (other.outcome, other.reward) == ("graded", 0.0)
    assert seconds < 1.0
