"""math_verify: verdicts that a person would give, and expressions that would hang or break a grader."""

import asyncio
import subprocess
import sys

import pytest

from megatron_vespo.config import DataConfig, FileSource, RewardConfig
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.scorers import build_scorer

SOURCE = FileSource(type="file", path="x.parquet", scorer="math_verify")


@pytest.fixture(scope="module")
def score():
    return build_scorer(SOURCE, "data.sources.0")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\dfrac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{\frac{6}{8}}", "3/4"),
        (r"\boxed{0.75}", r"\frac{3}{4}"),
        (r"\boxed{75\%}", r"\frac{3}{4}"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"),
        (r"\boxed{034}", "34"),
        (r"\boxed{34.0}", "34"),
        (r"\boxed{1,000}", "1000"),
        (r"$\{1,2,3\}$", r"\{3,2,1\}"),
        (r"\boxed{1,2,3}", r"\{1,2,3\}"),
        (r"\boxed{[0,1)}", "[0,1)"),
        (r"\boxed{10\text{ cm}}", "10"),
        (r"\boxed{10 \, \mathrm{km/h}}", "10"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{\$5.00}", "5"),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{x=5}", "5"),
        (r"\boxed{2^{10}}", "1024"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("First 12, then more.\n\nAnswer: $34$", "34"),
        (r"\boxed{34}, and to repeat: \boxed{34}", "34"),
    ],
)
def test_equal_values_are_right_however_they_are_written(score, response, answer):
    assert score(response, {"answer": answer}) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{\frac{4}{3}}", r"\frac{3}{4}"),
        (r"\boxed{0.333}", r"\frac{1}{3}"),
        (r"\boxed{3.14159}", r"\pi"),
        (r"\boxed{\{1,2\}}", r"\{1,2,3\}"),
        (r"\boxed{[0,1]}", "[0,1)"),
        (r"\boxed{(1,0)}", "(0,1)"),
        (r"\boxed{12} or \boxed{34}", "34"),
        (r"\boxed{}", "34"),
        (r"\boxed{34", "34"),
        (r"}{}{\\\boxed", "34"),
        (r"\boxed{\text{thirty-four}}", "34"),
        ("I do not know", "34"),
        ("", "34"),
        ("$" * 20_001, "34"),
        (r"\boxed{" * 1000, "34"),
    ],
)
def test_other_values_hedging_and_nonsense_are_wrong(score, response, answer):
    assert score(response, {"answer": answer}) == 0.0


BOMBS = {
    "regular expression": "final answer is " + "1+((" * 40_000,
    "number": r"\boxed{9^{9^{9^{9}}}}",
    "nesting": r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
}


def test_an_expression_that_hangs_costs_its_own_reward_and_no_other(trajectory):
    texts = [
        r"\boxed{34}",
        BOMBS["regular expression"],
        r"\boxed{34}",
        BOMBS["number"],
        BOMBS["nesting"],
        r"\boxed{35}",
    ]
    group = [trajectory(text, {"answer": "34"}, sample=number) for number, text in enumerate(texts)]
    config = RewardConfig(workers=3, timeout_seconds=8, on_failure=-0.5)
    with RewardPool(config, DataConfig(sources=(SOURCE,))) as pool:
        asyncio.run(pool.grade(group))
    nesting = group.pop(4)
    assert [t.reward for t in group] == [1.0, -0.5, 1.0, -0.5, 0.0]
    assert [t.outcome for t in group if t.reward == -0.5] == ["timeout"] * 2
    # Deep nesting is given up as unreadable, or takes too long: which one depends on the machine.
    assert (nesting.outcome, nesting.reward) in (("graded", 0.0), ("timeout", -0.5))


@pytest.mark.parametrize(("scorer", "library"), [("math_verify", "math_verify"), ("exact_match", "reasoning_gym")])
def test_libraries_are_loaded_before_the_first_deadline_begins(scorer, library):
    code = (
        "import sys\nfrom megatron_vespo.config import FileSource\n"
        "from megatron_vespo.rewards.scorers import build_scorer\n"
        f"before = {library!r} in sys.modules\n"
        f"build_scorer(FileSource(type='file', path='x.parquet', scorer={scorer!r}), 'k')\n"
        f"print(before, {library!r} in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"], run.stderr
