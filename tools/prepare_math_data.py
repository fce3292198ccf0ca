"""Questions for training and evaluation, as parquet files that `data.sources` reads (docs/data.md).

python tools/prepare_math_data.py --out data/math                                        # all, from the hub
python tools/prepare_math_data.py dapo aime24 --out data/math
python tools/prepare_math_data.py dapo=dapo-math-17k.parquet aime24=aime.jsonl --out data/math   # from local files

Writes one file for each dataset, evaluation.parquet (AIME24, AIME25 and AMC23 in one) and report.json: rows that could
not be used, duplicates, and what training and evaluation have in common.
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow
import pyarrow.parquet
import typer

from megatron_vespo.cli import exit_code
from megatron_vespo.config import ConfigError, DataConfig, FileSource, RewardConfig
from megatron_vespo.data.math_datasets import (
    DATASETS,
    Overlap,
    Question,
    Tally,
    find_overlaps,
    hub_rows,
    local_rows,
    read_questions,
)
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rollout.trajectory import Trajectory

TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
IN_TRAINING = ("aime24", "aime25", "amc23")
"""In evaluation.parquet: few and hard, so that a run can be evaluated often."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    out: Annotated[Path, typer.Option(help="Folder for the parquet files and report.json.")],
    datasets: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(DATASETS)}; all by default.", metavar="[NAME[=FILE]]...")
    ] = None,
    template: Annotated[
        str, typer.Option(help="The prompt; {question} is the question, {{ and }} are braces.")
    ] = TEMPLATE,
    keep_overlap: Annotated[
        bool, typer.Option("--keep-overlap", help="Report training questions that evaluation has, and keep them.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that check answers.")] = os.cpu_count() or 1,
) -> None:
    """Download or read, clean, check and write."""
    check_template(template)
    files = parse_names(datasets or list(DATASETS))
    tallies, kept = {}, {}
    for name, file in files.items():
        tallies[name] = Tally()
        rows = hub_rows(DATASETS[name]) if file is None else local_rows(file)
        kept[name] = read_questions(name, rows, tallies[name])
    ungradable = find_ungradable([question for questions in kept.values() for question in questions], workers)
    for question, outcome in ungradable.items():
        tallies[question.dataset].drop(f"an answer that math_verify can't grade ({outcome})", question.row)
    for name, questions in kept.items():
        kept[name] = [question for question in questions if question not in ungradable]
        if not kept[name]:
            raise ConfigError(f"{name}: none of {tallies[name].rows} rows can be used: {tallies[name].dropped}")
    overlaps = find_overlaps(of_use(kept, "train"), of_use(kept, "evaluation"))
    if not keep_overlap:
        in_evaluation = {overlap.train for overlap in overlaps}
        for question in sorted(in_evaluation, key=lambda question: question.row):
            tallies[question.dataset].drop("in an evaluation set", question.row)
        kept = {name: [q for q in questions if q not in in_evaluation] for name, questions in kept.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, questions in kept.items():
        tallies[name].kept = len(questions)
        write(questions, template, out / f"{name}.parquet")
    together = list({q.key: q for name in IN_TRAINING for q in kept.get(name, [])}.values())
    if together:
        write(together, template, out / "evaluation.parquet")
    report = describe(tallies, overlaps, kept, keep_overlap)
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print_report(report, out, len(together))


def check_template(template: str) -> None:
    try:
        if "7 + 5" not in template.format(question="7 + 5"):
            raise ConfigError("--template: has no {question}")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"--template: {error!r}; write {{{{ and }}}} for braces") from None


def parse_names(given: list[str]) -> dict[str, Path | None]:
    """Dataset -> local file, or None for the hub."""
    files: dict[str, Path | None] = {}
    for item in given:
        name, separator, path = item.partition("=")
        if name not in DATASETS:
            raise ConfigError(f"no dataset is called '{name}'; there are {', '.join(DATASETS)}")
        if name in files:
            raise ConfigError(f"dataset {name} is named twice")
        files[name] = Path(path) if separator else None
    return files


def of_use(kept: dict[str, list[Question]], use: str) -> Iterable[Question]:
    return (question for name, questions in kept.items() if DATASETS[name].use == use for question in questions)


def find_ungradable(questions: list[Question], workers: int) -> dict[Question, str]:
    """Those whose answer, given as a response, the scorer of a run does not find right within its deadline; and why."""
    tried = [
        Trajectory(
            prompt=Prompt(f"{q.dataset}/{q.row}", q.text, np.zeros(1, np.int32), 0, {"answer": q.answer}),
            sample=0,
            response_ids=np.zeros(0, np.int32),
            behavior_log_probs=np.zeros(0, np.float32),
            segments=[],
            finish_reason="stop",
            text=f"\\boxed{{{q.answer}}}",
        )
        for q in questions
    ]
    source = FileSource(type="file", path="(in memory)", scorer="math_verify")
    with RewardPool(RewardConfig(workers=workers), DataConfig(sources=(source,))) as pool:
        asyncio.run(pool.grade(tried))
    return {
        question: "not equal to itself" if trajectory.outcome == "graded" else trajectory.outcome
        for question, trajectory in zip(questions, tried, strict=True)
        if trajectory.outcome != "graded" or trajectory.reward != 1.0
    }


def write(questions: list[Question], template: str, path: Path) -> None:
    """Columns prompt, answer, question (without the template), dataset, row."""
    rows = [
        {
            "prompt": template.format(question=question.text),
            "answer": question.answer,
            "question": question.text,
            "dataset": question.dataset,
            "row": question.row,
        }
        for question in questions
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def describe(
    tallies: dict[str, Tally], overlaps: list[Overlap], kept: dict[str, list[Question]], keep_overlap: bool
) -> dict:
    train = {name: {q.key for q in questions} for name, questions in kept.items() if DATASETS[name].use == "train"}
    names = list(train)
    return {
        "datasets": {name: asdict(tally) for name, tally in tallies.items()},
        "overlap": {
            "removed from training": not keep_overlap,
            "questions": [
                {
                    "train": f"{overlap.train.dataset} row {overlap.train.row}",
                    "evaluation": f"{overlap.evaluation.dataset} row {overlap.evaluation.row}",
                    "exact": overlap.exact,
                    "share": round(overlap.share, 3),
                    "question": overlap.train.text,
                }
                for overlap in overlaps
            ],
        },
        "questions in two training sets": {
            f"{one} and {other}": len(train[one] & train[other])
            for number, one in enumerate(names)
            for other in names[number + 1 :]
        },
    }


def print_report(report: dict, out: Path, together: int) -> None:
    for name, tally in report["datasets"].items():
        print(f"{name}: {tally['kept']:,} of {tally['rows']:,} rows -> {out / name}.parquet")
        for reason, count in tally["dropped"].items():
            named = ", ".join(map(str, tally["named"][reason][:5]))
            print(f"  {count:,} left out, {reason}: row {named}{', ...' if count > 5 else ''}")
    overlaps = report["overlap"]["questions"]
    exact = sum(overlap["exact"] for overlap in overlaps)
    fate = "removed from" if report["overlap"]["removed from training"] else "KEPT in"
    print(
        f"overlap: {exact} training questions equal one of evaluation, {len(overlaps) - exact} nearly; {fate} training"
    )
    for names, count in report["questions in two training sets"].items():
        print(f"{names}: {count:,} questions are in both files")
    if together:
        print(f"evaluation: {together} questions -> {out / 'evaluation.parquet'}")
    print(f"report: {out / 'report.json'}")


if __name__ == "__main__":
    sys.exit(exit_code(app))
