"""docs/first_task.md, as a new user follows it: its files and its commands, in an empty folder beside the repository."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import REPOSITORY, Command, commands, write_files

PAGE = REPOSITORY / "docs" / "first_task.md"
BEFORE = ["make quickstart", "source .venv/bin/activate", "mkdir ../sums", "cd ../sums"]
"""What is done here by the fixture: the installation is that of the tests."""
SHORT = ["algorithm.steps=8", "algorithm.prompts_per_step=4", "evaluation.prompts=24"]
"""As the page says."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("user")
    (root / "megatron_vespo").symlink_to(REPOSITORY)
    (root / "sums").mkdir()
    write_files(PAGE, root / "sums")
    follow(of_page("python make_data.py"), root / "sums")
    return root / "sums"


def of_page(text: str) -> Command:
    (found,) = [command for command in commands() if command.page == PAGE and command.text == text]
    return found


def follow(command: Command, folder: Path, *more: str) -> str:
    """In a shell that knows this installation's programs. No network, as after an installation none is needed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),  # the installation may be that of another copy of the repository
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    line = " ".join([command.text, *more])
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command.where}: {line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_nothing_is_needed_that_the_page_does_not_say(folder):
    """Every command of the page is run here, and what it says of its shortening is what is done."""
    texts = [command.text for command in commands() if command.page == PAGE]
    assert texts == [
        *BEFORE,
        "python make_data.py",
        "megatron-vespo train sums.yaml --dry-run",
        "megatron-vespo train sums.yaml",
        "megatron-vespo report runs/sums",
        "megatron-vespo eval runs/sums/checkpoint sums.yaml",
        "python ask.py",
    ]
    assert " ".join(SHORT) in PAGE.read_text()


def test_its_questions_are_sums_and_none_is_held_out_and_trained_on(folder):
    rows = {name: list(csv.DictReader((folder / name).open())) for name in ("train.csv", "held_out.csv")}
    assert [len(part) for part in rows.values()] == [2000, 300]
    for row in [*rows["train.csv"], *rows["held_out.csv"]]:
        numbers = [
            int(n) for n in row["question"].split(":")[1].strip(" =").replace("+ ", "").replace("- ", "-").split()
        ]
        assert sum(numbers) == int(row["total"]) and len(numbers) == int(row["terms"])
    asked = [{row["question"] for row in part} for part in rows.values()]
    assert not asked[0] & asked[1]


def test_its_dry_run_prints_what_the_page_shows(folder):
    printed = follow(of_page("megatron-vespo train sums.yaml --dry-run"), folder)
    shown = PAGE.read_text().split("The last lines:")[1].split("\n## ")[0]
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert lines == [line.strip() for line in printed.splitlines()][-len(lines) :]


def test_its_reward_grades_as_the_page_says(folder, monkeypatch):
    from megatron_vespo.config import TrainConfig, load_config
    from megatron_vespo.rewards.scorers import build_scorer

    monkeypatch.chdir(folder)
    source = load_config(TrainConfig, "sums.yaml").data.sources[0]
    grade = build_scorer(source, "data.sources.0")
    row = {"question": "8 - 3 + 6 =", "total": "11", "terms": "3"}
    assert grade("8-3=5,5+6=11 <answer>11</answer>", row) == 1.0
    assert grade("<answer>11</answer>", row) == 0.5
    assert grade("8-3=5,5+6=11 <answer>12</answer>", row) == 0.0
    assert grade("eleven", row) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("more", [SHORT, []], ids=["short", "whole"])
@pytest.mark.timeout(1800)  # the half hour that a new user has
def test_it_trains_reports_evaluates_and_answers(folder, more):
    printed = follow(of_page("megatron-vespo train sums.yaml"), folder, *more)
    assert "runs/sums/report.html" in printed
    run = folder / "runs" / "sums"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["weight_sync_mismatches"] == 0
    if not more:
        assert summary["eval_accuracy_after"] > summary["eval_accuracy_before"] + 0.4
    (run / "report.html").unlink()
    follow(of_page("megatron-vespo report runs/sums"), folder)
    assert "State the final answer" in (run / "report.html").read_text()

    printed = follow(of_page("megatron-vespo eval runs/sums/checkpoint sums.yaml"), folder)
    accuracy = float(re.findall(r"avg@2\s+([\d.]+)", printed)[0])
    if not more:  # to the digit: the same questions and seeds, and the weights that the engine had in the run
        assert accuracy == pytest.approx(summary["eval_accuracy_after"], abs=0.0006)
    answer = follow(of_page("python ask.py"), folder)
    assert answer.strip()
    if not more:
        assert answer.strip() == "8-3=5,5+6=11,11+4=15 <answer>15</answer><eos>"
