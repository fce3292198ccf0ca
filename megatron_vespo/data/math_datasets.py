"""Public sets of mathematical questions, brought into one form: question, answer, where it is from."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.config import ConfigError
from megatron_vespo.data.file_source import read_rows


@dataclass(frozen=True)
class MathDataset:
    """`repository` and `split`: on the Hugging Face hub."""

    repository: str
    split: str
    use: Literal["train", "evaluation"]


DATASETS = {
    "dapo": MathDataset("BytedTsinghua-SIA/DAPO-Math-17k", "train", "train"),
    "deepscaler": MathDataset("agentica-org/DeepScaleR-Preview-Dataset", "train", "train"),
    "aime24": MathDataset("math-ai/aime24", "test", "evaluation"),
    "aime25": MathDataset("math-ai/aime25", "test", "evaluation"),
    "amc23": MathDataset("math-ai/amc23", "test", "evaluation"),
    "math500": MathDataset("HuggingFaceH4/MATH-500", "test", "evaluation"),
}
QUESTION_KEYS = ("problem", "question", "prompt", "Problem", "Question")
ANSWER_KEYS = ("answer", "final_answer", "Answer")
FRAMES = (
    (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
        '\n\nRemember to put your answer on its own line after "Answer:".',
    ),
)
"""What DAPO-Math-17k puts around each question."""
NAMED = 20
"""Rows that a report names for each reason."""


class BadRow(Exception):
    """The message is the reason, in few words: rows are counted by it."""


@dataclass(frozen=True)
class Question:
    """`row`: its number in the dataset, from 1."""

    text: str
    answer: str
    dataset: str
    row: int

    @property
    def key(self) -> str:
        return normalised(self.text)


@dataclass
class Tally:
    """What became of a dataset's rows. `dropped` and `named` go by reason; `named` are the first few row numbers."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        named = self.named.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(row)


def read_questions(name: str, rows: Iterable[dict[str, Any]], tally: Tally) -> list[Question]:
    """The different questions of `rows`; the first of equal ones stays. What does not is counted in `tally`.

    Where equal questions have different answers, none of them stays: one is wrong, and it can't be told which.
    """
    first: dict[str, Question] = {}
    conflicting: set[str] = set()
    for number, row in enumerate(rows, start=1):
        tally.rows += 1
        try:
            question = Question(question_of(row), answer_of(row), name, number)
        except BadRow as reason:
            tally.drop(str(reason), number)
            continue
        known = first.setdefault(question.key, question)
        if known is question:
            continue
        if normalised(known.answer) == normalised(question.answer):
            tally.drop("duplicate", number)
        else:
            tally.drop("another answer to the same question", number)
            conflicting.add(question.key)
    for key in conflicting:
        tally.drop("another answer to the same question", first.pop(key).row)
    return list(first.values())


def question_of(row: dict[str, Any]) -> str:
    """Text without what a dataset puts around it.

    Raises:
        BadRow: none, or an empty one.
    """
    value = next((row[key] for key in QUESTION_KEYS if row.get(key) is not None), None)
    if isinstance(value, list):  # chat messages, of which the user's is the question
        value = next((message.get("content") for message in value if message.get("role") == "user"), None)
    if not isinstance(value, str):
        raise BadRow("no question")
    for before, after in FRAMES:
        if value.startswith(before) and value.endswith(after):
            value = value[len(before) : len(value) - len(after)]
    if not value.strip():
        raise BadRow("empty question")
    return value.strip()


def answer_of(row: dict[str, Any]) -> str:
    r"""The answer alone: a column, DAPO's `reward_model.ground_truth`, or the last \boxed{...} of a solution.

    Raises:
        BadRow: none, or an empty one.
    """
    value = next((row[key] for key in ANSWER_KEYS if row.get(key) is not None), None)
    if value is None and isinstance(row.get("reward_model"), dict):
        value = row["reward_model"].get("ground_truth")
    if value is None and isinstance(row.get("solution"), str):
        value = last_boxed(row["solution"])
        if value is None:
            raise BadRow("no answer column, and no \\boxed in its solution")
    if value is None or isinstance(value, bool | list | dict):
        raise BadRow("no answer")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not str(value).strip():
        raise BadRow("empty answer")
    return str(value).strip()


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} whose braces are balanced."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            if text[position] in "{}" and text[position - 1] != "\\":
                depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start:position].strip()
    return None


SPACING = re.compile(r"\\(?:[,;:! ]|quad|qquad|left|right|displaystyle)(?![a-zA-Z])|[$\s]")


def normalised(text: str) -> str:
    """For comparison: one form of each character, no case, no spaces, no LaTeX that is only for the eye."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return SPACING.sub("", text).rstrip(".")


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


SHINGLE = 8
"""Words."""
NEAR = 0.6
"""Share of an evaluation question's shingles that a training question holds, above which they are taken for one."""


@dataclass(frozen=True)
class Overlap:
    """A training question that is in an evaluation set. `share` of its shingles; 1.0 and `exact`: equal texts."""

    train: Question
    evaluation: Question
    share: float
    exact: bool


def find_overlaps(train: Iterable[Question], evaluation: Iterable[Question]) -> list[Overlap]:
    """Equal questions, and those of which one contains most of the other's runs of 8 words, each once."""
    exact: dict[str, Question] = {}
    holders: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    sizes: dict[Question, int] = {}
    for question in evaluation:
        exact.setdefault(question.key, question)
        sizes[question] = len(runs := shingles(question.text))
        for run in runs:
            holders[run].append(question)
    found = []
    for question in train:
        if (same := exact.get(question.key)) is not None:
            found.append(Overlap(question, same, 1.0, True))
            continue
        hits = Counter(holder for run in shingles(question.text) for holder in holders.get(run, ()))
        shares = {holder: count / sizes[holder] for holder, count in hits.items()}
        nearest = max(shares, key=lambda holder: shares[holder], default=None)
        if nearest is not None and shares[nearest] >= NEAR:
            found.append(Overlap(question, nearest, shares[nearest], False))
    return found


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of 8 words; none in a shorter text."""
    listed = words(text)
    return {tuple(listed[start : start + SHINGLE]) for start in range(len(listed) - SHINGLE + 1)}


def local_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .parquet (a batch at a time: DAPO-Math-17k has 1.8 million), .jsonl, .csv, or .json (a list) file.

    Raises:
        ConfigError: missing, unreadable or of another kind.
    """
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(4096):
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path}: not readable as parquet: {error}") from None
    elif path.suffix == ".json" and path.is_file():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{path}: expected a list of objects")
        yield from rows
    else:
        yield from read_rows(path, "dataset")


def hub_rows(dataset: MathDataset) -> Iterator[dict[str, Any]]:
    """Rows of a dataset on the hub, downloaded into its cache.

    Raises:
        ConfigError: it can't be had.
    """
    from datasets import load_dataset

    try:
        loaded = load_dataset(dataset.repository, split=dataset.split)
    except Exception as error:  # the hub's, the network's and the file system's, of many classes
        raise ConfigError(
            f"{dataset.repository}: can't be loaded from the hub: {type(error).__name__}: {error}\n"
            "  On a host without network, give a local file: NAME=PATH"
        ) from error
    for row in loaded:
        yield dict(row)
