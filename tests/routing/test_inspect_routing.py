"""tools/inspect_routing.py on trajectories whose experts are written by hand below, with what must be seen in them."""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from megatron_vespo.cli import exit_code
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rollout.trajectory import Segment, Trajectory
from megatron_vespo.rollout.trajectory_file import write_trajectories
from megatron_vespo.routing.routes import Routes

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "inspect_routing.py"
TINY_BASE = ROOT / "examples" / "tiny_base"

# Positions 0 .. 3 of two prompt and three response tokens; two MoE layers, two experts each.
ENGINE = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]], [[5, 1], [0, 7]]]
TRAINER = [[[0, 1], [3, 2]], [[4, 6], [6, 7]], [[0, 2], [1, 3]], [[5, 1], [0, 7]]]
"""Against the engine: another order at (0, 1), another expert at (1, 0); position 3 is not recorded by the engine."""


def routes(experts, recorded, versions, **told) -> Routes:
    return Routes(np.array(experts, dtype=np.uint8), np.array(recorded), np.array(versions, dtype=np.int32), **told)


def trajectory(sample: int, engine: Routes | None, trainer: Routes | None) -> Trajectory:
    prompt = Prompt("sums/1/7", "What is [bold]1 + 1[/bold]?", np.array([10, 11], dtype=np.int32), 0, None)
    segments = [Segment(0, 1, 4, "a"), Segment(1, 3, 5, "b")]
    log_probs = np.zeros(3, dtype=np.float32)
    ids = np.array([12, 13, 14], dtype=np.int32)
    return Trajectory(prompt, sample, ids, log_probs, segments, "stop", engine_routes=engine, proximal_routes=trainer)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run whose tokenizer is the example's, with one compared trajectory and one of the engine alone."""
    engine = routes(ENGINE, [True, True, True, False], [4, 4, 5, 0], masked={"retracted": 1}, wire_bytes=96)
    trainer = routes(TRAINER, [True] * 4, [5] * 4)
    folder = tmp_path / "run"
    (folder / "routing").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(TINY_BASE)}}))
    write_trajectories([trajectory(0, engine, trainer), trajectory(1, engine, None)], folder / "routing")
    return folder


@dataclass
class Ran:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def tool():
    """The module tools/inspect_routing.py."""
    spec = importlib.util.spec_from_file_location("inspect_routing", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inspect(tool, capsys):
    """Runs the command with these arguments, as its last line does."""

    def run(*arguments: object) -> Ran:
        status = exit_code(lambda: tool.app([str(argument) for argument in arguments]))
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def printed(inspect):
    """What the command prints with --json."""

    def run(*arguments: object) -> dict:
        ran = inspect(*arguments, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def test_the_list_has_rows_versions_reasons_and_agreement(inspect, printed, run_dir):
    first, second = printed(run_dir)["trajectories"]
    assert (first["number"], first["sample"], first["prompt"]) == (0, 0, "What is [bold]1 + 1[/bold]?")
    assert (first["prompt_tokens"], first["response_tokens"]) == (2, 3)
    assert [segment["weight_version"] for segment in first["segments"]] == [4, 5]
    engine = {"positions": 4, "recorded": 3, "weight_versions": [4, 5], "masked": {"retracted": 1}, "wire_bytes": 96}
    assert first["engine"] == second["engine"] == engine
    assert first["agreement"] == [
        {"layer": 0, "positions": 3, "same_set": 2, "same_slots": 2},
        {"layer": 1, "positions": 3, "same_set": 3, "same_slots": 2},
    ]
    assert second["trainer"] is None and second["agreement"] is None
    text = inspect(run_dir).stdout
    assert "[bold]1 + 1[/bold]?" in text  # a prompt is text, not markup
    line = next(line for line in text.splitlines() if re.match(r"│ 0 ", line))
    # 5 of the 6 (position, layer) have the same experts, 4 in the same order.
    for expected in ("2+3", "4 > 5", "3/4", "4/4", "retracted 1", "83.3%", "66.7%"):
        assert expected in line


def test_a_trajectory_shows_each_choice_and_how_they_compare(printed, run_dir):
    found = printed(run_dir, "--trajectory", 0)["positions"]
    assert [(row["position"], row["token_id"], row["of"], row["weight_version"]) for row in found] == [
        (0, 10, "prompt", 4),
        (1, 11, "prompt", 4),
        (2, 12, "response", 5),
        (3, 13, "response", None),
    ]
    assert [[one["engine"] for one in row["layers"]] for row in found] == [*ENGINE[:3], [None, None]]
    assert [[one["trainer"] for one in row["layers"]] for row in found] == TRAINER
    assert [[one["verdict"] for one in row["layers"]] for row in found] == [
        ["same", "other order"],
        ["OTHER EXPERTS", "same"],
        ["same", "same"],
        ["one side only", "one side only"],
    ]


def test_tokens_are_text_where_the_runs_tokenizer_is_there_and_ids_where_it_is_not(inspect, printed, run_dir):
    vocabulary = json.loads((TINY_BASE / "tokenizer.json").read_text())["model"]["vocab"]
    bytes_of_gpt2 = {"Ġ": " ", "Ċ": "\n"}
    spelled = {number: word for word, number in vocabulary.items()}
    expected = ["".join(bytes_of_gpt2.get(sign, sign) for sign in spelled[token]) for token in (10, 11, 12, 13)]
    assert [row["token"] for row in printed(run_dir, "--trajectory", 0)["positions"]] == expected
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"model": {"path": "nowhere"}}))
    ran = inspect(run_dir, "--trajectory", 0)
    assert ran.returncode == 0 and "tokens are shown as ids: nowhere: no such folder" in ran.stderr
    assert re.search(r"│ +0 │ 10 +│ prompt", ran.stdout)


def test_only_disagreements_of_chosen_layers_are_shown(inspect, printed, run_dir):
    def places(*arguments: object) -> list[tuple[int, int]]:
        rows = printed(run_dir, "--trajectory", 0, *arguments)["positions"]
        return [(row["position"], one["layer"]) for row in rows for one in row["layers"]]

    assert places("--only-disagreements") == [(0, 1), (1, 0)]
    assert places("--only-disagreements", "--layers", "1") == [(0, 1)]
    assert places("--layers", "1") == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert len(places("--layers", "1,0")) == 8
    table = inspect(run_dir, "--trajectory", 0, "--only-disagreements").stdout
    assert "other order" in table and "OTHER EXPERTS" in table and "one side only" not in table
    assert "layer 0: 66.7% the same experts" in table


def test_a_checkpoint_is_read_with_the_tokenizer_of_its_run(printed, run_dir):
    checkpoint = run_dir / "checkpoints" / "step_00000008"
    checkpoint.parent.mkdir()
    (run_dir / "routing").rename(checkpoint)
    assert printed(checkpoint, "--trajectory", 1)["positions"][0]["token"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trajectory", "2"], r"--trajectory 2: .* has 0 to 1"),
        (["--trajectory", "-1"], r"--trajectory -1: .* has 0 to 1"),
        (["--trajectory", "0", "--layers", "2"], r"--layers 2: the trajectory has MoE layers 0 to 1"),
        (["--trajectory", "0", "--layers", "a"], r"--layers a: give numbers"),
        (["--layers", "0"], r"choose a trajectory with --trajectory N"),
    ],
)
def test_what_is_not_there_is_the_users_mistake(inspect, run_dir, arguments, message):
    ran = inspect(run_dir, *arguments)
    assert ran.returncode == 2 and re.search(message, ran.stderr), ran.stderr


def test_folders_without_routes_are_named(inspect, run_dir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [(tmp_path / "nothing", "no such folder"), (empty, "no recorded trajectories")]
    write_trajectories([], tmp_path)
    cases.append((tmp_path, "holds no trajectory"))
    bare = tmp_path / "bare"
    bare.mkdir()
    write_trajectories([trajectory(0, None, None)], bare)
    cases.append((bare, "no trajectory has routes"))
    (run_dir / "routing" / "trajectories.safetensors").write_bytes(b"cut off")
    cases.append((run_dir, "cannot be read"))
    for folder, message in cases:
        ran = inspect(folder)
        assert ran.returncode == 2 and message in ran.stderr, (folder, ran.stderr)


def test_routes_of_other_tokens_are_refused(inspect, run_dir):
    path = run_dir / "routing" / "trajectories.safetensors"
    arrays = load_file(path)
    arrays["lengths"] = np.array([2, 4], dtype=np.int64)
    save_file(arrays, path)
    ran = inspect(run_dir)
    assert ran.returncode == 2 and "trajectory 0 has 3 positions, but routes of shape (4, 2, 2)" in ran.stderr
