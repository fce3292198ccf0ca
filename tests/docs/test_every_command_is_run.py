"""Every command of the documentation is understood by the program that it calls, and run by a test that is named here.

commands.yaml says which. A command that is not there fails, and so do a line there that no page has any more, a test that
does not exist, and one whose source does not have the command's words. What needs GPUs, Slurm or the network says so
beside it on the page.
"""

import argparse
import ast
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from code_blocks import PAGES, REPOSITORY, Command, commands, files
from typer.main import get_command

from megatron_vespo.cli import app
from megatron_vespo.config import AblationConfig, EvaluateConfig, SFTConfig, TrainConfig, load_config

FILE = Path(__file__).with_name("commands.yaml")
TABLE: dict[str, list[str]] = yaml.safe_load(FILE.read_text())
"""Who runs them -> commands. Who: tests, joined by " + "; or one of these."""
NOT_RUN = {"GPUs": r"\bGPUs?\b", "network": r"\b(network|hub)\b|^hf ", "installation": ""}
"""Commands that no test runs, and what must stand in or beside each on its page."""
INSTALLATION = r"(git clone|python3\.11|\.venv/bin/python -m pip|source|mkdir|cd|sudo make) .*|make test"

COMMANDS = commands()
IDS = [command.where for command in COMMANDS]
KINDS = {"train": TrainConfig, "plan": TrainConfig, "submit": TrainConfig, "doctor": TrainConfig}
KINDS |= {"sft": SFTConfig, "eval": EvaluateConfig, "ablate": AblationConfig}
STAND_INS = {
    "sft": "examples/tiny_base.sft.yaml",
    "eval": "examples/tiny_base.eval.yaml",
    "ablate": "examples/lab/compare.yaml",
}
"""For CONFIG.yaml, GRID.yaml and FILE; else one for 8 nodes or the quickstart."""
TEMPLATES = {
    "train": ["megatron-vespo", "train"],
    "eval": ["megatron-vespo", "eval"],
    "prepare_data": ["python", "tools/prepare_math_data.py"],
}
"""What slurm/NAME.sbatch does with its arguments."""


INLINE = [
    (page, text)
    for page in PAGES
    for text in re.findall(r"`((?:megatron-vespo|python tools/|python benchmarks/)[^`\n]+)`", page.read_text())
    if not re.search(r"\.\.\.|&&", text)
]
"""(page, command) within sentences. Those of scripts are listed too; `megatron-vespo ...` there mostly names a command."""


class Understood(Exception):
    """The arguments were read, and nothing was done."""


def words_of(text: str) -> list[str]:
    """Of a command; the settings of the environment before it and folders of programs are left out."""
    words = shlex.split(text)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return [Path(words[0]).name, *words[1:]]


@cache
def module(path: str) -> dict:
    folder = str((REPOSITORY / path).parent)
    if folder not in sys.path:
        sys.path.append(folder)  # where a tool finds the files beside it
    return runpy.run_path(str(REPOSITORY / path), run_name="documented")


def read_by_click(command, words: list[str]) -> dict:
    """What they come to; the parser's own complaint is raised."""
    if hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no such command: {words[:1]}"
        return read_by_click(command.commands[words[0]], words[1:])
    return command.make_context(command.name or "", list(words)).params


def read_by_argparse(main, words: list[str], monkeypatch) -> None:
    def parse(self, args=None, namespace=None):
        read(self, args, namespace)
        raise Understood

    read = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", ["documented", *words])
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            main()
    except Understood:
        return
    except SystemExit:
        raise AssertionError(complaint.getvalue()) from None
    raise AssertionError("it reads no arguments")


def understand(words: list[str], command: Command, monkeypatch) -> None:
    program, *rest = words
    if program == "make":
        done = subprocess.run(["make", "--dry-run", *rest], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "megatron-vespo":
        rest = [word for word in rest if word not in ("[key=value", "...]")]
        understand_settings(rest[0], read_by_click(get_command(app), rest), command)
    elif program == "sbatch":
        understand(inside_a_job(rest), command, monkeypatch)
    elif program == "srun" and "megatron-vespo" in rest:
        understand(rest[rest.index("megatron-vespo") :], command, monkeypatch)
    elif program in ("python", "torchrun"):
        understand_script(rest, command, monkeypatch)
    else:  # a program of others
        assert program in ("srun", "squeue", "scontrol", "scancel", "wandb") or text_is_listed(command.text) in (
            "installation",
            "network",
        ), program


def inside_a_job(words: list[str]) -> list[str]:
    """The command that sbatch with these words would have a node run."""
    if "--wrap" in words:
        return words_of(words[words.index("--wrap") + 1])
    template = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    assert (REPOSITORY / words[template]).is_file(), words[template]
    name, given = Path(words[template]).stem, words[template + 1 :]
    if name == "convert":
        return ["python", f"tools/convert_{given[0]}.py", *given[1:]]
    if name == "ablation_array":
        return ["megatron-vespo", "ablate", given[0], "--out", *given[1:]]
    return [*TEMPLATES[name], *given]


def understand_script(words: list[str], command: Command, monkeypatch) -> None:
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        assert words[0] == "-m", command.text
        return
    path, given = words[place], words[place + 1 :]
    if path in files(command.page):  # of the page: its own test runs it
        return
    script = module(path)
    if "app" in script:
        read_by_click(get_command(script["app"]), given)
    elif given or "ArgumentParser" in (REPOSITORY / path).read_text():
        read_by_argparse(script["main"], given, monkeypatch)


def understand_settings(subcommand: str, given: dict, command: Command) -> None:
    """Its configuration exists, or stands for any, and takes the settings behind it."""
    key = {"eval": "tasks", "ablate": "grid"}.get(subcommand, "config")
    if given.get(key) is None or str(given[key]) in files(command.page):
        return
    path, overrides = str(given[key]), list(given.get("overrides") or ())
    if path in ("CONFIG.yaml", "CONFIG", "GRID.yaml", "FILE"):
        nodes = any(override.startswith("cluster.") for override in overrides)
        default = "examples/qwen3_30b_a3b/async_6_2.yaml" if nodes else "examples/quickstart.yaml"
        path = STAND_INS.get(subcommand, default)
    load_config(KINDS[subcommand], REPOSITORY / path, [o.replace("$replay", "R3") for o in overrides])


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_its_program_understands_it(command, monkeypatch):
    understand(words_of(command.text), command, monkeypatch)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("megatron-vespo plan CONFIG.yaml --nodez 8", "No such option: --nodez"),
        ("megatron-vespo trian CONFIG.yaml", "no such command"),
        ("megatron-vespo train CONFIG.yaml algorithm.stepz=1", "algorithm.stepz: unknown key"),
        ("megatron-vespo train examples/nowhere.yaml", "no such configuration file"),
        ("python tools/check_parallelism.py --layuots tp=2", "unrecognized arguments: --layuots"),
        ("python tools/convert_hf_to_megatron.py --hff HF --out OUT", "No such option: --hff"),
        ("sbatch slurm/nowhere.sbatch CONFIG.yaml", "nowhere.sbatch"),
        ("sbatch slurm/eval.sbatch CHECKPOINT", "tasks"),
        ("make quikstart", "quikstart"),
    ],
)
def test_a_mistake_in_a_command_is_found(text, complaint, monkeypatch):
    with pytest.raises(Exception) as raised:  # each program's own
        understand(words_of(text), Command(PAGES[0], 0, text, ""), monkeypatch)
    assert complaint in f"{raised.value} {getattr(raised.value, 'message', '')}"


def text_is_listed(text: str) -> str | None:
    return next((runner for runner, texts in TABLE.items() if text in texts), None)


def test_every_command_is_listed_once_and_nothing_else_is():
    listed = [text for texts in TABLE.values() for text in texts]
    written = {command.text for command in COMMANDS} | {text for _, text in INLINE if text.startswith("python ")}
    assert sorted(written - set(listed)) == [], f"say in {FILE.name} which test runs it"
    assert sorted(set(listed) - written) == [], "no page has it"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_what_no_test_runs_says_why_on_its_page(command):
    runner = text_is_listed(command.text)
    if runner == "installation":
        assert re.fullmatch(INSTALLATION, command.text)
    elif runner in NOT_RUN:
        assert re.search(NOT_RUN[runner], f"{command.text} # {command.comment}"), f"{command.text}   # {runner}?"


@cache
def source(test: str) -> str:
    """Of a test's file, and of the helpers in tests/ that it imports."""
    path = REPOSITORY / test.split("::")[0]
    assert path.is_file(), f"{test}: there is no such test"
    text = path.read_text()
    if "::" in test:
        names = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
        assert test.split("::")[1] in names, f"{test}: there is no such test"
    helpers = [path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return "\n".join([text, *(helper.read_text() for helper in helpers if helper.is_file())])


def evidence(command: Command) -> list[str]:
    """What the source of a test that runs it must have: the subcommand or tool, its options, settings and shipped files."""
    words = words_of(command.text)
    if words[0] in ("squeue", "scontrol", "scancel"):  # Slurm's own, which only show or end a job
        return []
    if words[0] == "make":
        recipe = subprocess.run(["make", "--dry-run", words[1]], cwd=REPOSITORY, capture_output=True, text=True).stdout
        words = words_of(next(line for line in recipe.splitlines() if "megatron-vespo" in line or "mkdocs" in line))
    if words[0] == "torchrun":
        words = words[next(number for number, word in enumerate(words) if word.endswith(".py")) :]
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    settings = [word.split("=")[0] for word in words if re.fullmatch(r"[a-z_]+\.[a-z_.]+=.*", word)]
    shipped = [word for word in words[1:] if (REPOSITORY / word).is_file() and word.startswith(("examples/", "slurm/"))]
    scripts = [Path(word).name for word in words if word.endswith(".py")]
    names = scripts or ([f'"{words[1]}"'] if words[0] == "megatron-vespo" else [])
    return [*names, *options, *settings, *shipped]


def names_of(word: str) -> list[str]:
    """By which a source may mean it: a file of a folder that it takes whole goes by the folder's name."""
    path = Path(word)
    return [word, path.name, *([path.parent.name] if len(path.parts) > 2 else [])]


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_the_test_that_is_named_runs_it(command):
    runner = text_is_listed(command.text)
    if runner is None or runner in NOT_RUN:
        return
    text = "\n".join(source(test) for test in runner.split(" + "))
    if command.page.stem in text and "code_blocks" in text:  # it takes its commands from the page
        return
    missing = [word for word in evidence(command) if not any(name in text for name in names_of(word))]
    assert not missing, f"{runner} has no {missing}"


@pytest.mark.parametrize(("page", "text"), INLINE, ids=[f"{page.stem}: {text}" for page, text in INLINE])
def test_commands_within_sentences_are_understood(page, text, monkeypatch):
    words = text.split()
    if words[0] == "megatron-vespo" and len(words) <= 3:  # the name of a command, mostly
        assert words[1] in get_command(app).commands
        return
    if words[:2] == ["megatron-vespo", "train"] and words[2].startswith("--"):  # of any configuration
        words.insert(2, "CONFIG.yaml")
    understand(words, Command(page, 0, text, ""), monkeypatch)
