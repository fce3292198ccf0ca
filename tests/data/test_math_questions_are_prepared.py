"""tools/prepare_math_data.py on small files in the datasets' own schemas, and what is made of them read as a run does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vespo.config import DataConfig, FileSource
from megatron_vespo.data.file_source import read_rows
from megatron_vespo.data.math_datasets import (
    BadRow,
    Question,
    Tally,
    answer_of,
    find_overlaps,
    last_boxed,
    normalised,
    question_of,
    read_questions,
)
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.data.tokenizer import load_tokenizer

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
COINS = "A bag has 3 red coins and 4 blue coins; two are drawn. In how many ways are both of them red coins?"
TRIANGLE = "In triangle $ABC$ let $AB = 13$, $BC = 14$ and $CA = 15$. Find the area of triangle $ABC$."
LATTICE = "Find the number of lattice paths from $(0,0)$ to $(4,4)$ that never go above the line $y = x$ at all."
REMAINDER = "Find the remainder when $2^{100}$ is divided by $7$."


def dapo(question: str, answer: object, index: int = 0) -> dict:
    """A row of BytedTsinghua-SIA/DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{BEFORE}{question}{AFTER}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{index}"},
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("downloads")
    rows = {
        "dapo.parquet": [
            dapo(COINS, "3"),
            dapo(COINS.replace("3 red", "$3$ red"), "3"),  # equal but for what only the eye sees
            dapo(TRIANGLE, "84"),  # AIME 24 has it too
            dapo("Of " + LATTICE, "14"),  # AMC 23 has nearly the same
            dapo(REMAINDER, "2"),
            dapo("How many primes are below 10?", "4"),
            dapo("How many primes are below 10?", "5"),
            dapo("What is half of nothing?", ""),
            dapo("What is 1 + 1?", "}{"),
        ],
        "deepscaler.json": [
            {"problem": REMAINDER, "answer": "2", "solution": r"... $\boxed{2}$"},
            {"problem": "Simplify $\\sqrt{8}$.", "answer": "2\\sqrt{2}", "solution": ""},
            {"problem": "", "answer": "1", "solution": ""},
        ],
        "aime24.parquet": [
            {"id": 60, "problem": TRIANGLE, "solution": r"\boxed{084}", "url": "https://example.org"},
            {"id": 61, "problem": "Find $m+n$ for the fraction above.", "solution": "no box", "url": ""},
        ],
        "aime25.jsonl": [{"problem": "Find the sum of all $b > 9$ with $17_b \\mid 97_b$.", "answer": "70", "id": "0"}],
        "amc23.parquet": [{"id": 0, "question": LATTICE, "answer": 14.0, "url": "https://example.org"}],
        "math500.jsonl": [
            {
                "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.",
                "solution": r"... $\boxed{\left( 3, \frac{\pi}{2} \right)}.$",
                "answer": r"\left( 3, \frac{\pi}{2} \right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            }
        ],
    }
    for name, listed in rows.items():
        path = folder / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(listed), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(listed))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    return {path.stem: path for path in folder.iterdir()}


def prepare(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd())}
    command = [sys.executable, "tools/prepare_math_data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("prepared")
    run = prepare(*(f"{name}={path}" for name, path in files.items()), "--out", out, "--workers", 1)
    assert run.returncode == 0, run.stderr
    return out, run.stdout


def questions(path: Path) -> list[str]:
    return [row["question"] for row in read_rows(path, "path")]


def test_each_dataset_becomes_a_file_of_its_good_rows(prepared):
    out, _ = prepared
    assert sorted(questions(out / "dapo.parquet")) == sorted([COINS, REMAINDER])
    assert sorted(questions(out / "deepscaler.parquet")) == sorted([REMAINDER, "Simplify $\\sqrt{8}$."])
    assert [(row["question"], row["answer"]) for row in read_rows(out / "aime24.parquet", "p")] == [(TRIANGLE, "084")]
    assert [(row["answer"], row["dataset"]) for row in read_rows(out / "amc23.parquet", "p")] == [("14", "amc23")]
    assert len(questions(out / "math500.parquet")) == 1
    assert {row["dataset"] for row in read_rows(out / "evaluation.parquet", "p")} == {"aime24", "aime25", "amc23"}


def test_rows_that_are_left_out_are_counted_and_named(prepared):
    out, told = prepared
    report = json.loads((out / "report.json").read_text())["datasets"]
    assert report["dapo"]["rows"] == 9 and report["dapo"]["kept"] == 2
    assert report["dapo"]["named"] == {
        "duplicate": [2],
        "another answer to the same question": [7, 6],
        "empty answer": [8],
        "an answer that math_verify can't grade (exception)": [9],
        "in an evaluation set": [3, 4],
    }
    assert sum(report["dapo"]["dropped"].values()) == 7
    assert report["deepscaler"]["named"] == {"empty question": [3]}
    assert report["aime24"]["named"] == {"no answer column, and no \\boxed in its solution": [2]}
    assert "dapo: 2 of 9 rows" in told and "1 left out, empty answer: row 8" in told


def test_what_training_and_evaluation_share_is_reported_and_removed(prepared):
    out, told = prepared
    report = json.loads((out / "report.json").read_text())
    found = {(o["train"], o["evaluation"], o["exact"]) for o in report["overlap"]["questions"]}
    assert found == {("dapo row 3", "aime24 row 1", True), ("dapo row 4", "amc23 row 1", False)}
    assert "1 training questions equal one of evaluation, 1 nearly; removed from training" in told
    assert report["questions in two training sets"] == {"dapo and deepscaler": 1}


def test_overlap_can_be_kept_and_the_prompt_be_ones_own(files, tmp_path):
    given = [f"{name}={files[name]}" for name in ("dapo", "aime24")]
    run = prepare(*given, "--out", tmp_path, "--keep-overlap", "--template", "Q: {question} {{A}}", "--workers", 1)
    assert run.returncode == 0 and "KEPT in training" in run.stdout
    assert TRIANGLE in questions(tmp_path / "dapo.parquet")
    assert f"Q: {COINS} {{A}}" in [row["prompt"] for row in read_rows(tmp_path / "dapo.parquet", "p")]


def test_a_run_reads_the_files(prepared):
    out, _ = prepared
    source = FileSource(type="file", path=str(out / "deepscaler.parquet"), scorer="math_verify")
    tokenizer = load_tokenizer("examples/tiny_base")
    prompts = PromptStream(DataConfig(sources=(source,), max_prompt_tokens=4096), tokenizer, seed=1).take(2)
    boxed = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert {prompt.text for prompt in prompts} == {REMAINDER + boxed, "Simplify $\\sqrt{8}$." + boxed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dapoo"], "no dataset is called 'dapoo'"),
        (["dapo=x.parquet", "dapo"], "named twice"),
        (["dapo=none.parquet"], "none.parquet: no such file"),
        (["dapo=README.md"], "is neither of"),
        (["dapo=x.jsonl", "--template", "no place"], "has no {question}"),
        (["dapo=x.jsonl", "--template", "\\boxed{} {question}"], "write {{ and }} for braces"),
    ],
)
def test_mistakes_are_told(tmp_path, arguments, message):
    run = prepare(*arguments, "--out", tmp_path / "out")
    assert run.returncode == 2 and message in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Find $x$ .", "find x", True),
        (r"$\dfrac{1}{2}\,$", r"\frac12".replace("12", "{1}{2}"), True),
        (r"\left( 3 \right)", "(3)", True),
        ("x²", "x2", True),
        ("Find $x + 1$", "Find $x - 1$", False),
        (r"\leftarrow", "arrow", False),
    ],
)
def test_questions_are_equal_where_only_their_look_differs(one, other, equal):
    assert (normalised(one) == normalised(other)) == equal


def test_answers_are_found_where_each_dataset_keeps_them():
    assert answer_of({"reward_model": {"ground_truth": "34"}}) == "34"
    assert answer_of({"answer": 27.0}) == "27"
    assert answer_of({"answer": "0.5", "solution": r"\boxed{1}"}) == "0.5"
    assert answer_of({"solution": r"\boxed{1}, so \boxed{\frac{1}{2}}"}) == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{a} and \boxed{b") == "a"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert question_of({"prompt": "as it is"}) == "as it is"
    for row in ({}, {"answer": None}, {"answer": [1]}, {"solution": "none"}, {"answer": " "}):
        with pytest.raises(BadRow):
            answer_of(row)
    with pytest.raises(BadRow):
        question_of({"prompt": [{"role": "system", "content": "x"}]})


def test_overlap_needs_most_of_the_evaluation_question():
    def question(text: str, dataset: str = "dapo") -> Question:
        return Question(text, "1", dataset, 1)

    words = [f"w{number}" for number in range(28)]  # 21 runs of 8 words
    evaluation = [question(" ".join(words), "aime24"), question("too short to be compared", "aime24")]
    most, half = " ".join(words[:22]), " ".join(words[:18])  # 15 and 11 of the 21 runs
    found = find_overlaps([question(most), question(half), question("Too short, to be compared")], evaluation)
    assert [(overlap.train.text, overlap.share) for overlap in found] == [(most, pytest.approx(15 / 21))]


def test_only_the_first_rows_of_a_reason_are_named():
    tally = Tally()
    read_questions("dapo", [{"problem": "", "answer": "1"}] * 50, tally)
    assert tally.dropped == {"empty question": 50} and tally.named["empty question"] == list(range(1, 21))
