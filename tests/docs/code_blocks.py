"""Code blocks of the documentation, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = tuple(
    sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "examples").glob("*/*.md")])
)
PROGRAMS = (
    *("megatron-vespo", "make", "python", "python3.11", "torchrun", "sbatch", "srun", "sinfo", "squeue", "scontrol"),
    *("scancel", "hf", "git", "cd", "source", "mkdir", "pip", "export", "sudo", "apt-get", "ray", "wandb"),
)
"""What a line of a block starts with if it is a command (see `is_command`)."""


@dataclass(frozen=True)
class Command:
    """One line of a block, as a user would type it; the comment behind it stands beside it."""

    page: Path
    line: int
    text: str
    comment: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, lines) of each indented or fenced block."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, found, fenced = 0, [], False
    for number, line in enumerate([*lines, ""], start=1):
        if line.startswith("```"):
            if fenced:
                yield start, found
                found = []
            fenced, start = not fenced, number + 1
        elif fenced:
            found.append(line)
        elif line.startswith("    ") and (found or not lines[number - 2].strip()):
            start = start if found else number
            found.append(line[4:])
        elif found and line.strip():
            yield start, _stripped(found)
            found = []
        elif found:
            found.append("")
    if found:
        yield start, _stripped(found)


def _stripped(lines: list[str]) -> list[str]:
    return "\n".join(lines).rstrip().split("\n")


def commands() -> list[Command]:
    """Every command in a block of every page."""
    return [command for page in PAGES for start, lines in blocks(page) for command in _of_block(page, start, lines)]


def _of_block(page: Path, start: int, lines: list[str]) -> Iterator[Command]:
    whole = ""
    for number, line in enumerate(lines, start=start):
        whole += line.strip()
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        text, _, comment = whole.partition(" #")
        whole = ""
        if is_command(text):
            yield Command(page, number, " ".join(text.split()), comment.strip())


def is_command(line: str) -> bool:
    """Settings of the environment may stand before it, and a folder before the program's name."""
    words = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return len(words) > 1 and not words[0].endswith("/") and Path(words[0]).name in PROGRAMS


def files(page: Path) -> dict[str, str]:
    """Blocks that are files, by name: the sentence before such a block names it and ends with a colon."""
    lines, found = page.read_text(encoding="utf-8").splitlines(), {}
    for start, block in blocks(page):
        before = [line for line in lines[: start - 1] if line.strip() and not line.startswith("```")]
        names = re.findall(r"`([\w./-]+\.(?:py|csv|yaml))`", before[-1] if before else "")
        if names and before[-1].endswith(":"):
            found[names[0]] = "\n".join(block) + "\n"
    return found


def write_files(page: Path, folder: Path) -> None:
    for name, text in files(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
